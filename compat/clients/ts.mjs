// The TypeScript SDK 1 (`@modelcontextprotocol/sdk`) or 2 (`@modelcontextprotocol/client`): node ts.mjs 1|2

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The modules of the directory that it runs in, not of this file's.
const require = createRequire(process.cwd() + "/");
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const one = process.argv[2] === "1";
const sdk = one ? "@modelcontextprotocol/sdk/client" : "@modelcontextprotocol/client";
const { Client } = await load(one ? `${sdk}/index.js` : sdk);
const { StdioClientTransport } = await load(one ? `${sdk}/stdio.js` : `${sdk}/stdio`);
const { StreamableHTTPClientTransport } = await load(one ? `${sdk}/streamableHttp.js` : sdk);

const [command, ...args] = JSON.parse(process.env.COMPAT_COMMAND);
const { COMPAT_COMMAND, ...env } = process.env;
const url = process.env.COMPAT_URL;
const found = {};
let known = {};

const check = (right, seen) => {
  if (!right) throw new Error(JSON.stringify(seen));
};
const call = async (given, options) => {
  const request = { name: "run_sandbox", arguments: { ...known, ...given } };
  const result = await (one ? client.callTool(request, undefined, options) : client.callTool(request, options));
  const data = result.structuredContent;
  if (data.sandbox) known = { sandbox: data.sandbox };
  return data;
};

const steps = {
  list: async () => check((await client.listTools()).tools.some((tool) => tool.name === "run_sandbox")),
  execute: async () => {
    const result = await call({ code: "print(6 * 7)" });
    check(result.output === "42\n", result);
  },
  progress: async () => {
    let count = 0;
    const code = "import time\nfor i in range(3): print(i, flush=True); time.sleep(0.4)";
    const result = await call({ code }, { onprogress: () => count++ });
    check(result.output === "0\n1\n2\n" && count >= 2, [result, count]);
  },
  status: async () => {
    const { execution_id } = await call({ mode: "async", code: "print('later')" });
    const result = await call({ mode: "status", execution_id, wait: true });
    check(result.state === "COMPLETED" && result.output === "later\n", result);
  },
  cancel: async () => {
    const { execution_id } = await call({ mode: "async", code: "import time; time.sleep(60)" });
    check((await call({ mode: "cancel", execution_id })).success);
    const result = await call({ mode: "status", execution_id, wait: true });
    check(result.state === "CANCELLED", result);
  },
  parallel: async () => {
    const results = await Promise.all([1, 2].map((n) => call({ code: `print(${n})` })));
    check(results.map((result) => result.output).join("") === "1\n2\n", results);
  },
  close: async () => check((await call({ mode: "close" })).success),
};

const client = new Client({ name: "compat", version: "0" });
try {
  await client.connect(
    url ? new StreamableHTTPClientTransport(new URL(url)) : new StdioClientTransport({ command, args, env }),
  );
  found.initialise = "ok";
  for (const [name, step] of Object.entries(steps)) {
    try {
      await step();
      found[name] = "ok";
    } catch (error) {
      console.error(error);
      found[name] = "FAILED";
    }
  }
  await client.close();
  found.end = "ok";
} catch (error) {
  console.error(error);
}
console.log(JSON.stringify(found));
process.exit(0);
