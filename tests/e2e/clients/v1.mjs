// The TypeScript SDK 1.x: node v1.mjs stdio COMMAND ARGUMENT... | http URL | sse URL
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { SSEClientTransport } from "@modelcontextprotocol/sdk/client/sse.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { play } from "./play.mjs";

const [, , kind, place, ...rest] = process.argv;
const transports = {
  stdio: () => new StdioClientTransport({ command: place, args: rest, env: process.env, stderr: "inherit" }),
  http: () => new StreamableHTTPClientTransport(new URL(place)),
  sse: () => new SSEClientTransport(new URL(place)),
};
const client = new Client({ name: "mechscope-e2e", version: "1" });
await client.connect(transports[kind]());
await play(client, (params, options) => client.callTool(params, undefined, options));
await client.close();
