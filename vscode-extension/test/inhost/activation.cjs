// What the extension costs before and when a Python file is opened.
"use strict";

const assert = require("node:assert/strict");
const fs = require("node:fs/promises");
const path = require("node:path");
const vscode = require("vscode");

const { workspace } = JSON.parse(process.env.PLANPATCH_INHOST);
const EXTENSION = "planpatch.planpatch";

describe("activation", () => {
  it("does nothing before a Python file is opened, and little then", async () => {
    const extension = vscode.extensions.getExtension(EXTENSION);
    assert.ok(extension, `${EXTENSION} is not here`);
    await fs.writeFile(path.join(workspace, "notes.md"), "# Notes\n");
    await vscode.window.showTextDocument(await vscode.workspace.openTextDocument(path.join(workspace, "notes.md")));
    assert.equal(extension.isActive, false);

    const startedAt = performance.now();
    await extension.activate();
    const took = performance.now() - startedAt;
    console.log(`suite: figures ${JSON.stringify({ "activation as the host sees it, its own queue included, ms": Math.round(took) })}`);
    assert.equal(extension.isActive, true);
  });
});
