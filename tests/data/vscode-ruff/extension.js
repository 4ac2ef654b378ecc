// Shows ruff's diagnostics. The test writes the path of ruff in the place of its name.
"use strict";

const { LanguageClient } = require("vscode-languageclient/node");

let client;

exports.activate = async () => {
  const options = { documentSelector: [{ scheme: "file", language: "python" }] };
  client = new LanguageClient("ruff", "Ruff", { command: "RUFF", args: ["server"] }, options);
  await client.start();
};

exports.deactivate = () => client?.stop();
