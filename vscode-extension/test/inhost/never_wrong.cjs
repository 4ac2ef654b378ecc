// A user who edits while patches are made for the same file. A change of the document that is not the user's has to be a
// patch that was made for exactly the text it meets, and it changes nothing outside of its function.
"use strict";

const assert = require("node:assert/strict");
const fs = require("node:fs/promises");
const path = require("node:path");
const vscode = require("vscode");

const { seed, sequences, workspace } = JSON.parse(process.env.PLANPATCH_INHOST);

const BEFORE = '"""Größen 🐍."""\n\n\x0c\nNAMES = ["🎉", "\\t"]\n\n\ndef other(a):\n\treturn a  # 📐\n\n\n';
const FUNCTION = "def size(x):\n    return x + 1\n";
const AFTER = "\n\nclass Shapes:\n\tdef area(self, w, h):  # 🤔\n\t\tunit = '🦊'\n\t\treturn w * h, unit\n\n\nLAST = size(1)";
const INTENTS = ["add 2 instead of 1", "multiply by 3", "return x minus 1", "return 0 when x is negative"];

describe("edits by the user while a patch is made", () => {
  before(async () => {
    await fs.writeFile(path.join(workspace, "first.py"), "x = 1\n");
    await vscode.window.showTextDocument(await vscode.workspace.openTextDocument(path.join(workspace, "first.py")));
    for (const end = Date.now() + 60_000; !(await vscode.commands.getCommands(true)).includes("planpatch.patch"); ) {
      assert.ok(Date.now() < end, "the extension does not offer planpatch.patch");
      await sleep(50);
    }
  });

  it(`lets no patch land on text it was not made for, seed ${seed}, ${sequences} sequences`, async () => {
    const told = { landed: 0, kept_out: 0, refused: 0, cancelled: 0, rolled_back: 0, edits: 0, raced: 0 };
    for (let number = 0; number < sequences; number += 1) {
      const sequence = new Sequence((seed ^ Math.imul(number + 1, 0x9e3779b1)) >>> 0, number, told);
      try {
        await sequence.run();
      } catch (error) {
        throw new Error(`seed ${seed}, number ${number}\n${sequence.story.join("\n")}`, { cause: error });
      }
    }
    console.log(`suite: figures ${JSON.stringify(told)}`);
    assert.ok(told.landed > 0, `no patch landed at all: ${JSON.stringify(told)}`);
    assert.ok(told.edits > sequences, JSON.stringify(told));
  });
});

class Sequence {
  constructor(number, index, told) {
    this.random = randomNumbers(number);
    this.isControl = index % 5 === 0; // the user does nothing, and the patch has to land
    this.takesBack = index % 5 === 1 || index % 5 === 2; // the text is the old one again before the patch is ready
    this.file = path.join(workspace, `sequence_${index}.py`);
    this.told = told;
    this.story = [];
    this.landings = [];
    this.own = undefined;
  }

  async run() {
    const eol = this.random() < 0.3 ? "\r\n" : "\n";
    const bom = this.random() < 0.2 ? "\ufeff" : "";
    await fs.writeFile(this.file, bom + (BEFORE + FUNCTION + AFTER).replaceAll("\n", eol));
    this.document = await vscode.workspace.openTextDocument(this.file);
    this.editor = await vscode.window.showTextDocument(this.document, { preview: false });
    this.eol = eol;
    this.bom = bom;
    this.text = this.document.getText();
    const listening = vscode.workspace.onDidChangeTextDocument((event) => this.changed(event));
    try {
      await this.editWhileAPatchIsMade();
      await this.settle();
      await this.checkLandings();
      await this.checkDisk();
    } finally {
      listening.dispose();
      await vscode.commands.executeCommand("workbench.action.revertAndCloseActiveEditor");
    }
  }

  async editWhileAPatchIsMade() {
    const line = this.lineOf("def size");
    const intent = this.choose(INTENTS);
    const uri = this.document.uri.toString();
    const position = { line: line + 1, character: 4 };
    const { jobId } = await vscode.commands.executeCommand("planpatch.patch", { uri, position, intent, fresh: true });
    this.note(`asked: ${intent}`);
    const planned = this.isControl ? 0 : 1 + Math.floor(this.random() * 6);
    let job = await status(jobId);
    for (let number = 0; number < planned && !ended(job); number += 1) {
      await sleep(this.random() * 900);
      await this.edit();
      job = await status(jobId);
    }
    if (this.takesBack) {
      await this.undoOwnEdits();
    }
    if (!this.isControl && this.random() < 0.08) {
      await vscode.commands.executeCommand("planpatch.cancel", { jobId });
      this.note("cancelled");
    }
    const races = !this.isControl && this.random() < 0.3;
    while (!ended(job)) {
      await sleep(races ? 5 : 40);
      job = await status(jobId);
    }
    this.note(`ended: ${job.state} ${job.error?.code ?? ""}`);
    if (races && job.state === "done") {
      this.told.raced += 1;
      await sleep(this.random() * 60);
      await this.edit();
    }
    assert.ok(["done", "refused", "cancelled"].includes(job.state), JSON.stringify(job));
    this.job = job;
  }

  // The patch has landed, or does not any more.
  async settle() {
    if (this.job.state !== "done") {
      this.told[this.job.state] += 1;
      await sleep(200);
      return;
    }
    for (const end = Date.now() + 4000; Date.now() < end; await sleep(40)) {
      const entry = await ledger(this.job.patchId);
      if (entry.state !== "proposed") {
        break;
      }
      if (this.document.getText() !== normal(entry.base, this.eol) && Date.now() > end - 3200) {
        break;
      }
    }
    await sleep(100);
    this.told[this.landings.length > 0 ? "landed" : "kept_out"] += 1;
    assert.ok(!this.isControl || this.landings.length === 1, "nobody edited, and the patch did not land");
  }

  changed(event) {
    if (event.document !== this.document || event.contentChanges.length === 0) {
      return;
    }
    const before = this.text;
    this.text = event.document.getText();
    if (this.own === undefined || !this.own(event, before)) {
      this.note(`a change that is not the user's: ${JSON.stringify(event.contentChanges.map((one) => one.text))}`);
      this.landings.push({ before, after: this.text });
    }
  }

  async checkLandings() {
    assert.ok(this.landings.length <= 1, `${this.landings.length} changes that are not the user's`);
    if (this.landings.length === 0) {
      return;
    }
    assert.equal(this.job.state, "done", "a job without a patch changed the document");
    const [{ before, after }] = this.landings;
    const entry = await ledger(this.job.patchId);
    assert.equal(before, normal(entry.base, this.eol), "it landed on text it was not made for");
    assert.equal(after, normal(entry.patched, this.eol), "what landed is not the patch");
    const [start, end] = [entry.start_line - 1, entry.end_line];
    const lines = before.split(this.eol);
    const head = lines.slice(0, start).map((one) => one + this.eol).join("");
    const tail = lines.slice(end).map((one) => this.eol + one).join("");
    assert.ok(after.startsWith(head) && after.endsWith(tail), "text outside of the function changed");
    assert.ok(["applied", "diverged", "rejected", "rolled_back"].includes(entry.state), entry.state);
    if (this.document.getText() === after) {
      assert.equal(entry.state, "applied");
      if (this.random() < 0.5) {
        await this.rollBack(before);
      }
    }
  }

  async rollBack(before) {
    this.own = () => true;
    const uri = this.document.uri.toString();
    const { jobId } = await vscode.commands.executeCommand("planpatch.rollback", { uri });
    let job = await status(jobId);
    while (!ended(job)) {
      await sleep(20);
      job = await status(jobId);
    }
    assert.equal(job.state, "done", JSON.stringify(job));
    assert.equal(this.document.getText(), before, "the roll-back did not give the text back");
    this.told.rolled_back += 1;
  }

  async checkDisk() {
    await this.document.save();
    const bytes = await fs.readFile(this.file);
    assert.equal(bytes.toString("utf8"), this.bom + this.document.getText());
    const text = this.document.getText();
    assert.equal(text.split("\n").length - 1, text.split(this.eol).length - 1, "line ends were mixed");
  }

  // --- what the user does --------------------------------------------------------------------------------------------

  async edit() {
    this.told.edits += 1;
    const kind = this.random();
    if (kind < 0.1) {
      this.note("saves");
      await this.document.save();
    } else if (kind < 0.2) {
      await this.turn("undo", vscode.TextDocumentChangeReason.Undo);
    } else if (kind < 0.25) {
      await this.turn("redo", vscode.TextDocumentChangeReason.Redo);
    } else if (kind < 0.6) {
      await this.insert(this.inFunction(), this.choose(["1", " ", "x", "🐍", "\n    y = 2", " + 3"]));
    } else if (kind < 0.85) {
      await this.insert(this.anywhere(), this.choose(["a", "# é", "\n", "\t", "🦊", "'''", "\nimport os\n"]));
    } else {
      await this.remove(this.random() < 0.5 ? this.inFunction() : this.anywhere());
    }
  }

  async undoOwnEdits() {
    for (let number = 0; number < 12 && this.landings.length === 0; number += 1) {
      if (this.document.getText() === normal(BEFORE + FUNCTION + AFTER, this.eol)) {
        break;
      }
      await this.turn("undo", vscode.TextDocumentChangeReason.Undo);
    }
    this.note("undid everything");
  }

  async insert(offset, text) {
    this.note(`inserts ${JSON.stringify(text)} at ${offset}`);
    const wanted = text.replaceAll("\n", this.eol);
    this.own = (event) => event.contentChanges.length === 1 && event.contentChanges[0].text === wanted;
    await this.editor.edit((edit) => edit.insert(this.document.positionAt(offset), text));
    this.own = undefined;
  }

  async remove(offset) {
    const range = new vscode.Range(this.document.positionAt(offset), this.document.positionAt(offset + 3));
    this.note(`removes ${JSON.stringify(this.document.getText(range))} at ${offset}`);
    this.own = (event) => event.contentChanges.length === 1 && event.contentChanges[0].text === "";
    await this.editor.edit((edit) => edit.delete(range));
    this.own = undefined;
  }

  async turn(command, reason) {
    this.note(command);
    this.own = (event) => event.reason === reason;
    await vscode.commands.executeCommand(command);
    this.own = undefined;
  }

  lineOf(text) {
    return this.document.getText().split("\n").findIndex((line) => line.startsWith(text));
  }

  inFunction() {
    const text = this.document.getText();
    const start = Math.max(0, text.indexOf("def size"));
    return start + Math.floor(this.random() * FUNCTION.length);
  }

  anywhere() {
    return Math.floor(this.random() * this.document.getText().length);
  }

  choose(list) {
    return list[Math.floor(this.random() * list.length)];
  }

  note(what) {
    this.story.push(`${new Date().toISOString().slice(17, 23)} ${what}`);
  }
}

const ended = (job) => !["waiting", "loading", "running"].includes(job.state);
const status = (jobId) => vscode.commands.executeCommand("planpatch.status", { jobId });
const ledger = (patchId) => vscode.commands.executeCommand("planpatch.ledger", { patchId });
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const normal = (text, eol) => text.replace(/^\ufeff/, "").replaceAll("\r\n", "\n").replaceAll("\n", eol);

// Mulberry32: small, seeded, good enough to choose edits.
function randomNumbers(number) {
  let state = number >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}
