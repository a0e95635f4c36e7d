"""The MCP server: tools, session store, transports. The only place where engine and schemas meet."""
