// Patches that wait: a diff, marks and lenses at each hunk in the file itself, and what the user decides. The file holds
// its own text until the server has been told to apply; no marker is ever written into it.

import * as vscode from "vscode";
import type { Connection } from "./connection";
import { baseLines, hunkAt, hunkDiff, lensLine, type Lines, nextHunk, patchedLines } from "./hunks";
import { PatchReview, type Request } from "./patchReview";
import { planMark } from "./planMark";
import type { Entry, Job } from "./protocol";
import { said } from "./telling";
import { besideColumn, idOf, SCHEME, type Texts } from "./texts";

const { t } = vscode.l10n;

const OFFERED_MS = 5000;

interface Shown {
  review: PatchReview;
  entry: Entry;
  uri: vscode.Uri;
}

export class Reviews implements vscode.CodeLensProvider, vscode.HoverProvider {
  private readonly shown = new Map<string, Shown>();
  private readonly loading = new Map<string, Promise<Shown | null>>();
  private readonly saidToWait = new Map<string, vscode.Disposable>();
  private readonly lensesChanged = new vscode.EventEmitter<void>();
  readonly onDidChangeCodeLenses = this.lensesChanged.event;
  /** The last refusal for each document, as the argument that asks again. */
  private readonly refused = new Map<string, Job>();
  private readonly mark = vscode.window.createTextEditorDecorationType({
    isWholeLine: true,
    backgroundColor: new vscode.ThemeColor("planpatch.pendingHunkBackground"),
    borderColor: new vscode.ThemeColor("planpatch.pendingHunkBorder"),
    borderStyle: "solid",
    borderWidth: "0 0 0 3px",
    overviewRulerColor: new vscode.ThemeColor("planpatch.pendingHunkBorder"),
    overviewRulerLane: vscode.OverviewRulerLane.Left,
  });

  constructor(
    context: vscode.ExtensionContext,
    private readonly connection: Connection,
    private readonly texts: Texts,
  ) {
    context.subscriptions.push(
      this.mark,
      this.lensesChanged,
      vscode.languages.registerCodeLensProvider([{ language: "python", scheme: "file" }, { scheme: SCHEME }], this),
      vscode.languages.registerHoverProvider({ language: "python", scheme: "file" }, this),
      connection.onDidChange(() => connection.inBackground(this.follow())),
      { dispose: connection.jobs.listen((job) => connection.inBackground(this.jobChanged(job))) },
      vscode.workspace.onDidChangeTextDocument((event) => this.textChanged(event.document)),
      vscode.workspace.onDidOpenTextDocument((document) => this.textChanged(document)),
      vscode.workspace.onDidCloseTextDocument((document) => this.textChanged(document)),
      vscode.window.onDidChangeVisibleTextEditors(() => this.draw()),
      vscode.window.onDidChangeActiveTextEditor(() => this.setContext()),
    );
  }

  // --- what waits -----------------------------------------------------------------------------------------------------

  /** Have what the server offers, and nothing else. */
  private async follow(): Promise<void> {
    const offered = new Set(this.connection.status?.pending ?? []);
    for (const [id, message] of this.saidToWait) {
      if (!offered.has(id)) {
        message.dispose();
        this.saidToWait.delete(id);
      }
    }
    for (const [id, { review }] of this.shown) {
      if (!offered.has(id)) {
        review.withdrawn();
        await this.removeIfGone(id);
      }
    }
    await Promise.all([...offered].map((id) => this.load(id)));
  }

  private load(id: string): Promise<Shown | null> {
    const known = this.shown.get(id);
    if (known !== undefined) {
      return Promise.resolve(known);
    }
    const loading = this.loading.get(id) ?? this.fetch(id).finally(() => this.loading.delete(id));
    this.loading.set(id, loading);
    return loading;
  }

  private async fetch(id: string): Promise<Shown | null> {
    const entry = await this.connection.command<Entry>("planpatch.ledger", { patchId: id });
    if (entry.path === null || !(this.connection.status?.pending ?? []).includes(id)) {
      return null;
    }
    const uri = vscode.Uri.file(entry.path);
    const shown = { review: new PatchReview(entry, textOf(uri)), entry, uri };
    this.shown.set(id, shown);
    this.draw();
    return shown;
  }

  private async jobChanged(job: Job): Promise<void> {
    if (job.kind === "patch" && job.state === "done" && job.patchId !== undefined) {
      this.refused.delete(key(vscode.Uri.parse(job.uri)));
      await this.present(job.patchId, job);
    } else if ((job.kind === "patch" || job.kind === "plan") && (job.state === "refused" || job.state === "failed")) {
      this.tellEnd(job);
    } else if ((job.state === "refused" || job.state === "failed") && job.error !== undefined) {
      void vscode.window.showErrorMessage(`PlanPatch: ${said(job.error)}`);
    }
  }

  /** Show a patch that was just made, the way the user set. */
  private async present(id: string, job: Job): Promise<void> {
    const warnings = job.patch?.warnings ?? [];
    const status = await this.connection.askStatus();
    if (status.apply === "direct" && job.patch?.second_choice !== true) {
      warnings.forEach((warning) => void vscode.window.showWarningMessage(`PlanPatch: ${warning}`));
      return;
    }
    const shown = (await this.isOffered(id)) ? await this.load(id) : null;
    if (shown === null) {
      return;
    }
    const doubts = job.patch?.second_choice === true ? [t("It is the model's second choice: look at it first.")] : [];
    [...doubts, ...warnings].forEach((doubt) => void vscode.window.showWarningMessage(`PlanPatch: ${doubt}`));
    if (shown.review.phase === "stale") {
      this.tellStale(shown.entry);
      return;
    }
    await this.moveToFile(shown);
    if (this.connection.own.review === "preview") {
      await this.preview(id);
    } else if (this.connection.own.review === "diff") {
      await keepFocus(() => this.showDiff(id));
    }
    if (this.connection.status?.pending.includes(id) === true) {
      const waits = t("PlanPatch: a patch waits in {0}", entryName(shown.entry));
      this.saidToWait.set(id, vscode.window.setStatusBarMessage(waits, 5000));
    }
  }

  private tellStale(entry: Entry): void {
    const message = t("The text changed while it was written: ask again, or undo your change.");
    const again = t("Ask Again");
    void vscode.window.showWarningMessage(`PlanPatch: ${message}`, again).then((chosen) => {
      if (chosen === again) {
        void vscode.commands.executeCommand("planpatch.ui.retry", { patchId: entry.id, asItWas: true });
      }
    });
  }

  /** From the plan that it was made from to its first hunk; whoever works elsewhere by now stays there. */
  private async moveToFile({ entry, uri }: Shown): Promise<void> {
    const active = vscode.window.activeTextEditor?.document;
    const edit = entry.edits[0];
    if (active !== undefined && edit !== undefined && key(active.uri) === key(uri)) {
      const line = lensLine(edit, active.lineCount);
      const place = new vscode.Range(line, 0, line, 0);
      vscode.window.activeTextEditor?.revealRange(place, vscode.TextEditorRevealType.InCenterIfOutsideViewport);
      return;
    }
    if (active?.languageId !== "markdown" || edit === undefined || planMark(active.lineAt(0).text) === null) {
      return;
    }
    const known = vscode.window.visibleTextEditors.find((editor) => key(editor.document.uri) === key(uri));
    const editor = await vscode.window.showTextDocument(uri, { viewColumn: known?.viewColumn ?? vscode.ViewColumn.One });
    const line = lensLine(edit, editor.document.lineCount);
    editor.selection = new vscode.Selection(line, 0, line, 0);
    editor.revealRange(editor.selection, vscode.TextEditorRevealType.InCenterIfOutsideViewport);
  }

  /** A job's end comes a moment before the status that says that its patch waits. */
  private isOffered(id: string): Promise<boolean> {
    const isSo = (): boolean => this.connection.status?.pending.includes(id) ?? false;
    if (isSo()) {
      return Promise.resolve(true);
    }
    return new Promise((resolve) => {
      const end = (answer: boolean): void => {
        clearTimeout(timer);
        listening.dispose();
        resolve(answer);
      };
      const timer = setTimeout(() => end(false), OFFERED_MS);
      const listening = this.connection.onDidChange(() => {
        if (isSo()) {
          end(true);
        }
      });
    });
  }

  private tellEnd(job: Job): void {
    if (job.error === undefined) {
      return;
    }
    this.refused.set(key(vscode.Uri.parse(job.uri)), job);
    this.setContext();
    const message = `PlanPatch: ${said(job.error)}`;
    if (job.state === "failed" || job.kind === "plan") {
      void vscode.window.showErrorMessage(message);
      return;
    }
    const [retry, why] = [t("Retry with Feedback…"), t("Why?")];
    const id = job.error.details.patch_id;
    const buttons = typeof id === "string" && id !== "" ? [retry, why] : [retry];
    void vscode.window.showWarningMessage(message, ...buttons).then((chosen) => {
      if (chosen === retry) {
        void vscode.commands.executeCommand("planpatch.ui.retry", { uri: job.uri });
      } else if (chosen === why) {
        void vscode.commands.executeCommand("planpatch.ui.why", id);
      }
    });
  }

  private textChanged(document: vscode.TextDocument): void {
    const text = document.isClosed ? undefined : document.getText();
    let isChanged = false;
    for (const shown of this.of(document.uri)) {
      isChanged = shown.review.textIs(text) || isChanged;
    }
    if (isChanged) {
      this.draw();
    }
  }

  private async removeIfGone(id: string): Promise<void> {
    if (this.shown.get(id)?.review.phase === "gone") {
      this.shown.delete(id);
      this.draw();
      await this.texts.close(id);
    }
  }

  // --- what the user decides --------------------------------------------------------------------------------------------

  /** The patch that a command means: by id, or the one in the active editor. */
  find(id?: string): { id: string; entry: Entry; uri: vscode.Uri } | null {
    const document = vscode.window.activeTextEditor?.document;
    const chosen =
      id !== undefined
        ? this.shown.get(id)
        : document === undefined
          ? undefined
          : (this.shown.get(idOf(document.uri)) ?? this.of(document.uri).find((one) => one.review.isOpen));
    return chosen === undefined ? null : { id: chosen.entry.id, entry: chosen.entry, uri: chosen.uri };
  }

  /** The refusal that a retry means. */
  refusal(uri: vscode.Uri): Job | undefined {
    return this.refused.get(key(uri));
  }

  async decide(decision: "accepted" | "rejected", id?: string, hunk?: number): Promise<void> {
    const shown = this.find(id);
    const known = shown === null ? undefined : this.shown.get(shown.id);
    if (known === undefined) {
      return;
    }
    const request = known.review.decide(hunk ?? this.hunkAtCursor(known.entry), decision);
    this.draw();
    await this.carryOut(known, request);
  }

  async apply(id?: string): Promise<void> {
    const known = this.shown.get(this.find(id)?.id ?? "");
    if (known !== undefined) {
      await this.carryOut(known, known.review.applyRest());
    }
  }

  async reject(id?: string): Promise<void> {
    const known = this.shown.get(this.find(id)?.id ?? "");
    if (known !== undefined) {
      await this.carryOut(known, known.review.rejectAll());
    }
  }

  private async carryOut({ review, entry, uri }: Shown, request: Request): Promise<void> {
    if (request.do === "nothing") {
      return;
    }
    let isDone = false;
    this.draw();
    try {
      if (request.do === "reject") {
        await this.connection.command("planpatch.reject", { patchId: entry.id });
        isDone = true;
      } else {
        const job = await this.connection.job("planpatch.apply", { patchId: entry.id, hunks: request.hunks });
        isDone = job.ok === true;
        this.tellApplied(entry, job);
      }
    } finally {
      review.ended(isDone, textOf(uri));
      await this.removeIfGone(entry.id);
      this.draw();
    }
  }

  private tellApplied(entry: Entry, job: Job): void {
    if (job.ok !== true) {
      if (job.error === undefined && job.reason !== undefined) {
        void vscode.window.showWarningMessage(`PlanPatch: ${job.reason}`);
      }
      return;
    }
    const [keep, back] = [t("Keep"), t("Roll Back")];
    void vscode.window
      .showInformationMessage(t("PlanPatch: applied to {0}.", entryName(entry)), keep, back)
      .then((chosen) => {
        if (chosen === keep) {
          void vscode.commands.executeCommand("planpatch.ui.keep", entry.id);
        } else if (chosen === back) {
          this.connection.inBackground(this.rollBack(entry));
        }
      });
  }

  /** The message stays where the user undid the patch meanwhile. */
  private async rollBack(entry: Entry): Promise<void> {
    const now = await this.connection.command<Entry>("planpatch.ledger", { patchId: entry.id });
    if (now.state === "applied" || now.state === "accepted" || now.state === "diverged") {
      await vscode.commands.executeCommand("planpatch.ui.rollback", entry.id);
    } else {
      vscode.window.setStatusBarMessage(t("PlanPatch: it is not in {0} any more.", entryName(entry)), 5000);
    }
  }

  /** The editor's own preview, hunk by hunk; what is left ticked there is applied. */
  async preview(id?: string): Promise<void> {
    const found = this.find(id);
    if (found === null) {
      return;
    }
    await vscode.window.showTextDocument(found.uri);
    const job = await this.connection.job("planpatch.apply", { patchId: found.id, confirm: true });
    if (job.ok === true) {
      this.tellApplied(found.entry, job);
    }
  }

  async showDiff(id?: string): Promise<void> {
    const found = this.find(id);
    if (found !== null) {
      await openDiff(this.texts, found.entry);
    }
  }

  goTo(step: 1 | -1): void {
    const editor = vscode.window.activeTextEditor;
    const found = this.find();
    if (editor === undefined || found === null) {
      return;
    }
    const places = placesIn(editor.document, found.entry);
    const place = places[nextHunk(places, editor.selection.active.line, step)];
    if (place !== undefined) {
      const line = Math.max(0, Math.min(place.start, editor.document.lineCount - 1));
      editor.selection = new vscode.Selection(line, 0, line, 0);
      editor.revealRange(editor.selection, vscode.TextEditorRevealType.InCenterIfOutsideViewport);
    }
  }

  private hunkAtCursor(entry: Entry): number {
    const editor = vscode.window.activeTextEditor;
    return editor === undefined ? -1 : hunkAt(placesIn(editor.document, entry), editor.selection.active.line);
  }

  // --- what is shown ----------------------------------------------------------------------------------------------------

  provideCodeLenses(document: vscode.TextDocument): vscode.CodeLens[] {
    const patched = this.shown.get(idOf(document.uri));
    if (patched !== undefined) {
      return isAfter(document) ? this.lenses(patched, document) : [];
    }
    return this.of(document.uri)
      .filter(({ review }) => review.phase === "waiting" || review.phase === "applying")
      .flatMap((shown) => this.lenses(shown, document));
  }

  private lenses({ review, entry }: Shown, document: vscode.TextDocument): vscode.CodeLens[] {
    return placesIn(document, entry).flatMap((place, hunk) => {
      const line = Math.max(0, Math.min(place.start, document.lineCount - 1));
      const range = new vscode.Range(line, 0, line, 0);
      if (!review.isOpen) {
        return [new vscode.CodeLens(range, { title: t("PlanPatch: applying…"), command: "" })];
      }
      const of = entry.edits.length > 1 ? ` (${hunk + 1}/${entry.edits.length})` : "";
      const decision = review.decisions[hunk];
      const title = (done: boolean, word: string): string => `${done ? "$(check) " : ""}${word}`;
      const lens = (words: string, command: string, ...args: unknown[]): vscode.CodeLens =>
        new vscode.CodeLens(range, { title: words, command: `planpatch.ui.${command}`, arguments: args });
      return [
        lens(title(decision === "accepted", t("Accept")) + of, "acceptHunk", entry.id, hunk),
        lens(title(decision === "rejected", t("Reject")), "rejectHunk", entry.id, hunk),
        lens(t("Retry…"), "retry", { patchId: entry.id }),
        ...(hunk === 0
          ? [
              lens(t("Show Diff"), "showDiff", entry.id),
              ...(entry.edits.length > 1 ? [lens(t("Apply All"), "apply", entry.id)] : []),
            ]
          : []),
      ];
    });
  }

  provideHover(document: vscode.TextDocument, position: vscode.Position): vscode.Hover | undefined {
    for (const { review, entry } of this.of(document.uri)) {
      const edit = entry.edits.find((one) => {
        const lines = baseLines(one);
        const line = lensLine(one, document.lineCount);
        return position.line === line || (lines.start <= position.line && position.line <= lines.end);
      });
      if (review.isOpen && edit !== undefined) {
        const text = new vscode.MarkdownString();
        text.appendCodeblock(hunkDiff(edit), "diff");
        return new vscode.Hover(text);
      }
    }
    return undefined;
  }

  private draw(): void {
    for (const editor of vscode.window.visibleTextEditors) {
      const { document } = editor;
      const open = this.of(document.uri).filter(({ review }) => review.phase === "waiting");
      const ranges = open.flatMap(({ entry }) =>
        entry.edits.map((edit) => {
          const { start, end } = baseLines(edit);
          const first = Math.min(start, document.lineCount - 1);
          return new vscode.Range(first, 0, Math.max(first, Math.min(end, document.lineCount - 1)), 0);
        }),
      );
      editor.setDecorations(this.mark, ranges);
    }
    this.lensesChanged.fire();
    this.setContext();
  }

  private setContext(): void {
    const uri = vscode.window.activeTextEditor?.document.uri;
    const isPending = uri !== undefined && (this.find() !== null || this.of(uri).some(({ review }) => review.isOpen));
    const set = (name: string, value: boolean): Thenable<unknown> =>
      vscode.commands.executeCommand("setContext", `planpatch.${name}`, value);
    void set("patchPending", isPending);
    void set("patchRefused", uri !== undefined && this.refused.has(key(uri)));
  }

  private of(uri: vscode.Uri): Shown[] {
    return uri.scheme === "file" ? [...this.shown.values()].filter((shown) => key(shown.uri) === key(uri)) : [];
  }
}

/** The editor's own diff of a proposal, in whatever state it is. */
export async function openDiff(texts: Texts, entry: Entry): Promise<void> {
  const name = entry.path === null ? "code.py" : (entry.path.split(/[\\/]/).at(-1) ?? "code.py");
  if (entry.path !== null) {
    texts.about(entry.id, vscode.Uri.file(entry.path));
  }
  const before = texts.set(entry.id, `before/${name}`, entry.base);
  const after = texts.set(entry.id, `after/${name}`, entry.patched ?? entry.base);
  const title = t("{0}: {1} (PlanPatch)", name, entry.intent === "" ? entry.id : entry.intent.slice(0, 60));
  const edit = entry.edits[0];
  const selection = edit === undefined ? undefined : new vscode.Range(edit.start_line - 1, 0, edit.start_line - 1, 0);
  await vscode.commands.executeCommand("vscode.diff", before, after, title, {
    viewColumn: besideColumn(entry.path === null ? undefined : vscode.Uri.file(entry.path)),
    preview: true,
    selection,
  });
}

/** Open something beside without taking the user away from where they type; `vscode.diff` takes no notice of that wish. */
async function keepFocus(open: () => Promise<void>): Promise<void> {
  const before = vscode.window.activeTextEditor;
  await open();
  if (before?.viewColumn !== undefined && vscode.window.activeTextEditor !== before) {
    const { document, selection, viewColumn } = before;
    await vscode.window.showTextDocument(document, { viewColumn, selection });
  }
}

/** Where the hunks of a patch are in a document: the file itself, or the right side of the diff. */
function placesIn(document: vscode.TextDocument, entry: Entry): Lines[] {
  return isAfter(document) ? patchedLines(entry.edits) : entry.edits.map(baseLines);
}

function isAfter(document: vscode.TextDocument): boolean {
  return document.uri.scheme === SCHEME && document.uri.path.split("/")[2] === "after";
}

export function entryName(entry: Pick<Entry, "scope" | "path">): string {
  return entry.scope !== "" ? entry.scope : (entry.path?.split(/[\\/]/).at(-1) ?? t("the whole file"));
}

function textOf(uri: vscode.Uri): string | undefined {
  return vscode.workspace.textDocuments.find((document) => key(document.uri) === key(uri))?.getText();
}

/** A file's name for comparisons: Windows' letters have no case that counts. */
function key(uri: vscode.Uri): string {
  return process.platform === "win32" ? uri.fsPath.toLowerCase() : uri.fsPath;
}
