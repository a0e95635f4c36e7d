"""Traces on disk: what is written is what ran, and nothing else is read back."""

import hashlib
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tiny_files
from declared import points_of
from recording import everything
from safetensors.numpy import load_file, save_file
from tolerances import assert_same

from engine import export_trace, load_model, load_trace
from engine.errors import DamagedFile, InputError, LayerError, PointError
from engine.load import WEIGHTS

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "trace-manifest.schema.json").read_text())


@pytest.fixture
def trace(synthetic, tmp_path):
    export_trace(synthetic, [1, 2, 3], ["resid_post", "attn_pattern", "embed"], tmp_path / "t", layers=[1, -1])
    return tmp_path / "t"


def test_a_trace_holds_what_a_run_shows_at_every_point(model, ids, tmp_path):
    shown = everything(model, ids)
    manifest = export_trace(model, ids, points_of(model), tmp_path / "t")
    read = load_trace(tmp_path / "t")
    assert read.manifest == manifest
    assert set(read.tensors) == set(shown)
    for place, array in read.tensors.items():
        assert_same(array, shown[place])


def test_the_manifest_follows_its_schema_and_says_what_was_run(synthetic, tmp_path):
    manifest = export_trace(synthetic, "hello", ["z", "final_norm"], tmp_path / "a" / "t", layers=[0])
    jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker()).validate(manifest)
    assert json.loads((tmp_path / "a" / "t" / "manifest.json").read_text()) == manifest
    assert manifest["prompt"] == {"text": "hello", "ids": synthetic.encode("hello")}
    assert manifest["model"]["fingerprint"] == synthetic.fingerprint
    assert [(t["name"], t["axes"]) for t in manifest["tensors"]] == [
        ("z.0", ["seq", "head", "d_head"]),
        ("final_norm", ["seq", "d_model"]),
    ]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_schema_knows_every_way_to_keep_weights(weights, tmp_path):
    model = load_model(tiny_files.gguf_file(tmp_path / "tiny.gguf"), weights=weights)
    manifest = export_trace(model, [1, 2], ["z"], tmp_path / "t", layers=[0])
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert (manifest["model"]["weights"], manifest["model"]["fingerprint"]) == (weights, model.fingerprint)


def test_the_schema_refuses_what_the_format_does_not_have(trace):
    manifest = json.loads((trace / "manifest.json").read_text())
    for change in ({"version": 2}, {"surprise": 1}, {"tensors": []}, {"prompt": {"text": None, "ids": []}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(manifest | change, SCHEMA)


def test_the_file_can_be_read_without_the_engine(trace):
    manifest = json.loads((trace / "manifest.json").read_text())
    arrays = load_file(trace / "trace.safetensors")
    for entry in manifest["tensors"]:
        array = arrays[entry["name"]]
        assert list(array.shape) == entry["shape"]
        assert hashlib.sha256(array.astype("<f4").tobytes()).hexdigest() == entry["sha256"]


def test_a_changed_number_is_noticed(trace):
    arrays = load_file(trace / "trace.safetensors")
    arrays["resid_post.1"][0, 0] = np.nextafter(arrays["resid_post.1"][0, 0], np.float32(9))
    save_file(arrays, trace / "trace.safetensors")
    with pytest.raises(DamagedFile, match=r"resid_post\.1.*not the tensor that was written"):
        load_trace(trace)


def test_missing_added_and_renamed_tensors_are_noticed(trace):
    arrays = load_file(trace / "trace.safetensors")
    renamed = {name.replace("embed", "embde"): array for name, array in arrays.items()}
    for changed in (arrays | {"more": np.zeros(1, "f4")}, {"embed": arrays["embed"]}, renamed):
        save_file(changed, trace / "trace.safetensors")
        with pytest.raises(DamagedFile, match="does not hold the tensors"):
            load_trace(trace)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2; this mechscope reads 1"),
        ({"schema": "other"}, "not the manifest of a trace"),
        ({"tensors": None}, "does not list its tensors"),
        ({"tensors": [{"name": "z"}]}, "does not list its tensors"),
    ],
)
def test_other_manifests_are_refused(trace, change, message):
    manifest = json.loads((trace / "manifest.json").read_text())
    (trace / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(DamagedFile, match=message):
        load_trace(trace)


@pytest.mark.parametrize("name", ["manifest.json", "trace.safetensors"])
def test_a_truncated_or_missing_file_is_refused(trace, name):
    whole = (trace / name).read_bytes()
    for cut in range(0, len(whole), max(1, len(whole) // 40)):
        (trace / name).write_bytes(whole[:cut])
        with pytest.raises(DamagedFile):
            load_trace(trace)
    (trace / name).unlink()
    with pytest.raises(DamagedFile, match="cannot be read"):
        load_trace(trace)


def test_what_cannot_be_exported_leaves_nothing_behind(synthetic, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    refused = [
        ((["z"], tmp_path / "there"), InputError, "exists already"),
        (([], tmp_path / "t"), InputError, "at least one point"),
        ((["nowhere"], tmp_path / "t"), PointError, "the points are"),
        ((["z"], tmp_path / "t", [4]), LayerError, "valid: 0 to 3"),
        ((["z"], tmp_path / "file" / "t"), InputError, "cannot be written"),
    ]
    for arguments, error, message in refused:
        with pytest.raises(error, match=message):
            export_trace(synthetic, [1, 2], *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


def test_a_run_that_is_stopped_leaves_nothing_behind(synthetic, tmp_path):
    def stop(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_trace(synthetic, [1, 2], ["z"], tmp_path / "t", tick=stop)
    assert list(tmp_path.iterdir()) == []
