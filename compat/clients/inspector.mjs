// The inspector's command line, which makes a connection for each command and has no progress.

import { execFile } from "node:child_process";
import { promisify } from "node:util";

const run = promisify(execFile);
const [command, ...args] = JSON.parse(process.env.COMPAT_COMMAND);
const url = process.env.COMPAT_URL;
const target = url ? [url, "--transport", "http"] : [command, ...args];
const found = {};

const inspect = async (...words) => {
  const { stdout } = await run("node_modules/.bin/mcp-inspector", ["--cli", ...target, ...words]);
  return JSON.parse(stdout);
};
try {
  const { tools } = await inspect("--method", "tools/list");
  found.initialise = "ok";
  found.list = tools.some((tool) => tool.name === "run_sandbox") ? "ok" : "FAILED";
  const result = await inspect("--method", "tools/call", "--tool-name", "run_sandbox", "--tool-arg", "code=print(6 * 7)");
  found.execute = result.structuredContent.output === "42\n" ? "ok" : "FAILED";
  for (const step of ["progress", "status", "cancel", "parallel", "close"]) found[step] = "-";
  found.end = "ok";
} catch (error) {
  console.error(error);
}
console.log(JSON.stringify(found));
