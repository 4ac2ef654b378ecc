// VS Code's extension host calls `run` (as @vscode/test-electron has it do) and ends with a failure if it rejects.
// PLANPATCH_INHOST, JSON: {mocha, files, workspace, …what the files want}; tests/e2e/test_vscode_inhost.py sets it.
"use strict";

const path = require("node:path");

exports.run = async () => {
  const options = JSON.parse(process.env.PLANPATCH_INHOST);
  const Mocha = require(options.mocha);
  const mocha = new Mocha({ ui: "bdd", timeout: 0, reporter: Lines });
  for (const file of options.files) {
    mocha.addFile(path.join(__dirname, file));
  }
  const failed = await new Promise((resolve) => mocha.run(resolve));
  if (failed > 0) {
    throw new Error(`${failed} tests failed`);
  }
};

// One string for each line: VS Code's window gets the arguments of console.log one by one and formats nothing.
function Lines(runner) {
  runner.on("pass", (test) => console.log(`suite: ok - ${test.fullTitle()} (${test.duration} ms)`));
  runner.on("pending", (test) => console.log(`suite: left out - ${test.fullTitle()}`));
  runner.on("fail", (test, error) => {
    const told = [error.stack ?? error, error.cause?.stack ?? ""].join("\n");
    console.log(`suite: FAILED - ${test.fullTitle()}\n${told}`);
  });
  runner.on("end", () => console.log(`suite: ${runner.stats?.passes} passed, ${runner.failures} failed`));
}
