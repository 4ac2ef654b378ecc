// Answers what the Python extension is asked: which interpreter belongs to the workspace.
"use strict";

const path = require("node:path");
const vscode = require("vscode");

exports.activate = () => {
  const [folder] = vscode.workspace.workspaceFolders;
  const interpreter = path.join(folder.uri.fsPath, ".venv", "bin", "python");
  return { environments: { getActiveEnvironmentPath: () => ({ path: interpreter }) } };
};
