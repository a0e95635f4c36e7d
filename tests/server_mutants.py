"""Mutants of the server: answers' numbers, other principals' handles, refused arguments, budgets, notices.

Each replaces as little text as names one thing, so that code may move round it.
"""

from functools import partial

from mutant import Mutant

_server = partial(Mutant, package="server")

SERVER_MUTANTS = (
    # --- numbers and notices of answers
    _server("server: KL the other way round", "tools/effects.py", "kl_divergence(effect, baseline)",
            "kl_divergence(baseline, effect)",
            "test_tools.py::test_forward_ablate_reports_the_effect_and_how_often_it_fired"),
    _server("server: a comparison's KL the other way round", "tools/comparing.py", "kl_divergence(lens_b, lens_a)",
            "kl_divergence(lens_a, lens_b)",
            "test_tools.py::test_prompts_captures_and_models_are_compared_layer_by_layer"),
    _server("server: synthetic weights are not told", "lab.py", "[SYNTHETIC_NOTICE] *", "[] *",
            "test_tools.py::test_every_result_on_the_synthetic_model_says_that_it_is_synthetic"),
    _server("server: rounded weights are not told", "lab.py", "[ROUNDED_NOTICE] *", "[] *",
            "test_models.py::test_weights_in_bfloat16_are_another_model_and_every_result_says_so"),
    _server("server: the chat template is left out", "call.py", "if not self.chat:\n            return",
            "if True:\n            return",
            "test_chat.py::test_the_tokens_are_those_of_the_templated_text"),
    # --- what is refused
    _server("server: another model's capture is read", "call.py", '!= model.fingerprint:',
            '!= model.fingerprint and False:',
            "test_tools.py::test_a_capture_is_never_read_with_another_models_lens"),
    _server("server: unknown arguments are ignored", "toolbox.py", 'extra="forbid", strict=True',
            'extra="ignore", strict=True',
            "test_bad_input.py::test_a_wrong_call_says_what_is_valid_and_loses_nothing"),
    _server("server: texts pass as numbers", "toolbox.py", 'extra="forbid", strict=True',
            'extra="forbid", strict=False',
            "test_bad_input.py::test_a_wrong_call_says_what_is_valid_and_loses_nothing"),
    _server("server: models load from every folder", "sources.py", "or any(real.is_relative_to(root)",
            "or True or any(real.is_relative_to(root)",
            "test_http.py::test_models_by_path_load_from_allowed_folders_only"),
    _server("server: a prompt takes tokens that the model splits", "prompts/__init__.py",
            "known.tokenizer.single(text)",
            "known.tokenizer.encode(text)",
            "test_prompts.py::test_a_token_that_is_several_of_the_models_tokens_is_refused"),
    # --- whose it is
    _server("server: any token is known", "auth.py", "if hmac.compare_digest(digest, shown)", "if digest",
            "test_http.py::test_without_a_known_token_the_answer_is_401_and_says_how"),
    _server("server: others' captures are there", "store.py", "record is None or record.owner != owner",
            "record is None",
            "test_store.py::test_to_another_principal_a_handle_does_not_exist"),
    _server("server: others' jobs are there", "store.py", "run is None or run.owner != owner", "run is None",
            "test_store.py::test_a_run_is_kept_as_it_was_last_saved_and_belongs_to_one_principal"),
    _server("server: others' captures are there, on disk", "disk_store.py",
            '"SELECT * FROM records WHERE handle = ? AND owner = ?"',
            '"SELECT * FROM records WHERE handle = ? AND owner != char(0) || ?"',
            "test_store.py::test_to_another_principal_a_handle_does_not_exist"),
    # --- limits
    _server("server: one call too many of a principal", "gate.py", "own >= self._most_each", "own > self._most_each",
            "test_messages.py::test_a_quoted_message_is_what_one_gets"),
    _server("server: one call too many in all", "gate.py", "self.inside >= self._most", "self.inside > self._most",
            "test_jobs.py::test_jobs_count_as_calls_and_a_full_server_can_still_be_asked_and_relieved"),
    _server("server: memory has no bound", "store.py", "used + wanted > self._budget:",
            "used + wanted > 1000 * self._budget:",
            "test_store.py::test_a_budget_that_is_used_up_is_an_error_that_names_what_to_release"),
)  # fmt: skip
