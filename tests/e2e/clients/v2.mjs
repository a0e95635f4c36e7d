// The TypeScript SDK 2.x: node v2.mjs legacy|REVISION stdio COMMAND ARGUMENT... | http URL | sse URL
import { Client, SSEClientTransport, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";
import { play } from "./play.mjs";

const [, , era, kind, place, ...rest] = process.argv;
const transports = {
  stdio: () => new StdioClientTransport({ command: place, args: rest, env: process.env, stderr: "inherit" }),
  http: () => new StreamableHTTPClientTransport(new URL(place)),
  sse: () => new SSEClientTransport(new URL(place)),
};
const mode = era === "legacy" ? era : { pin: era };
const client = new Client({ name: "mechscope-e2e", version: "1" }, { versionNegotiation: { mode } });
await client.connect(transports[kind]());
await play(client, (params, options) => client.callTool(params, options));
await client.close();
