// Plays scenario.json with a connected client and prints what came back as JSON, for test_clients.py to judge.
import { readFile } from "node:fs/promises";

const scenario = JSON.parse(await readFile(new URL("../scenario.json", import.meta.url)));
const AFTER = 3; // progress notifications that come in before the long call is cancelled

// call(params, options) calls a tool: the two SDKs differ in where the options go.
export async function play(client, call) {
  const tools = (await client.listTools()).tools.map((tool) => tool.name);
  const ask = {
    "tools/call": (params) => call(params),
    "resources/list": (params) => client.listResources(params),
    "resources/read": (params) => client.readResource(params),
    "prompts/list": (params) => client.listPrompts(params),
    "prompts/get": (params) => client.getPrompt(params),
    "completion/complete": (params) => client.complete(params),
  };
  const kept = {};
  const answers = [];
  for (const step of scenario.steps) {
    const { method, params } = step.tool ? toolCall(step) : step;
    const answer = await ask[method](filled(params ?? {}, kept));
    for (const [name, field] of Object.entries(step.keep ?? {})) kept[name] = answer.structuredContent[field];
    answers.push(answer);
  }
  const cancelled = await cancel(call);
  const after = await call({ name: "list_session", arguments: {} });
  const revision = client.getNegotiatedProtocolVersion?.() ?? null;
  console.log(JSON.stringify({ tools, answers, kept, cancelled, after, revision }));
}

const toolCall = (step) => ({ method: "tools/call", params: { name: step.tool, arguments: step.arguments } });

const filled = (value, kept) =>
  JSON.parse(Object.entries(kept).reduce((text, [name, handle]) => text.replaceAll(name, handle), JSON.stringify(value)));

async function cancel(call) {
  const controller = new AbortController();
  const progress = [];
  const onprogress = (report) => {
    progress.push(report);
    if (progress.length === AFTER) controller.abort("enough");
  };
  try {
    await call({ name: scenario.long.tool, arguments: scenario.long.arguments }, { onprogress, signal: controller.signal });
    return { progress, ended: "with an answer" };
  } catch (error) {
    return { progress, ended: String(error.message) };
  }
}
