// Plans: a view that fills while the model writes, then the plan's own Markdown file, which the user may edit; "Patch from
// this plan" stands in it. What counts is the saved file.

import * as vscode from "vscode";
import type { Connection } from "./connection";
import { hasEnded } from "./jobs";
import { lensLineOf, type PlanMark, planMark } from "./planMark";
import type { Argument, Job } from "./protocol";
import { besideColumn, type Texts } from "./texts";

const { t } = vscode.l10n;

export class PlanView implements vscode.CodeLensProvider {
  private readonly written = new Map<string, string>();

  constructor(
    context: vscode.ExtensionContext,
    private readonly connection: Connection,
    private readonly texts: Texts,
  ) {
    connection.openDocument = (uri) => this.open(uri);
    context.subscriptions.push(
      vscode.languages.registerCodeLensProvider({ language: "markdown", scheme: "file" }, this),
      vscode.window.onDidChangeActiveTextEditor(() => this.setContext()),
      vscode.workspace.onDidChangeTextDocument((event) => {
        if (event.document === vscode.window.activeTextEditor?.document) {
          this.setContext();
        }
      }),
      { dispose: connection.jobs.listen((job) => connection.inBackground(this.jobChanged(job))) },
    );
    this.setContext();
  }

  /** Show the plan as it is written. */
  private async jobChanged(job: Job): Promise<void> {
    if (job.kind !== "plan") {
      return;
    }
    const id = `live-${job.jobId}`;
    if (hasEnded(job)) {
      this.written.delete(job.jobId);
      await this.texts.close(id);
      return;
    }
    if (job.state !== "running") {
      return;
    }
    const isFirst = !this.written.has(job.jobId);
    const text = (this.written.get(job.jobId) ?? "") + (job.stage === "plan" ? (job.text ?? "") : "");
    this.written.set(job.jobId, text);
    const title = t("Plan for {0}", job.function === "" ? t("the whole file") : job.function);
    const uri = this.texts.set(id, `${title}.md`, `# ${title}\n\n## Plan\n\n${text}▍\n`);
    if (isFirst) {
      await vscode.window.showTextDocument(uri, {
        viewColumn: besideColumn(),
        preserveFocus: true,
        preview: true,
      });
      if (!this.written.has(job.jobId)) {
        await this.texts.close(id); // it ended while the editor opened
      }
    }
  }

  /** A file that the server wants shown: a plan, or what stands against a roll-back. */
  private async open(uri: vscode.Uri): Promise<boolean> {
    const document = await vscode.workspace.openTextDocument(uri);
    const mark = planMark(document.lineAt(0).text);
    const viewColumn = besideColumn(mark === null ? undefined : vscode.Uri.file(mark.path));
    const editor = await vscode.window.showTextDocument(document, { viewColumn, preview: false });
    const line = lensLineOf(document.getText().split("\n"));
    editor.revealRange(new vscode.Range(line, 0, line, 0), vscode.TextEditorRevealType.InCenterIfOutsideViewport);
    return true;
  }

  provideCodeLenses(document: vscode.TextDocument): vscode.CodeLens[] {
    const mark = planMark(document.lineAt(0).text);
    if (mark === null) {
      return [];
    }
    const line = lensLineOf(document.getText().split("\n"));
    const range = new vscode.Range(line, 0, line, 0);
    const lens = (title: string, command: string): vscode.CodeLens =>
      new vscode.CodeLens(range, { title, command: `planpatch.ui.${command}`, arguments: [document.uri] });
    return [
      lens(`$(play) ${t("Patch from this plan")}`, "patchFromPlan"),
      lens(mark.plan === "" ? t("Plan from this request") : t("Plan again"), "planAgain"),
    ];
  }

  private setContext(): void {
    const document = vscode.window.activeTextEditor?.document;
    const isPlan = document?.languageId === "markdown" && planMark(document.lineAt(0).text) !== null;
    void vscode.commands.executeCommand("setContext", "planpatch.planActive", isPlan);
  }

  /** Save a plan document and say what it is about, for a command of the server. Null: it is no plan document. */
  async argument(given?: vscode.Uri): Promise<Argument | null> {
    const document =
      given === undefined ? vscode.window.activeTextEditor?.document : await vscode.workspace.openTextDocument(given);
    const mark = document === undefined ? null : planMark(document.lineAt(0).text);
    if (document === undefined || mark === null) {
      return null;
    }
    if (document.isDirty && !(await document.save())) {
      return null; // the user was told by the editor
    }
    return await this.placeOf(mark);
  }

  /** The function of a plan, with its file open in the editor. */
  private async placeOf(mark: PlanMark): Promise<Argument> {
    const uri = vscode.Uri.file(mark.path);
    const python = await vscode.workspace.openTextDocument(uri);
    const isVisible = vscode.window.visibleTextEditors.some((editor) => editor.document === python);
    if (!isVisible) {
      await vscode.window.showTextDocument(python, { viewColumn: vscode.ViewColumn.One, preserveFocus: true });
    }
    return { uri: this.connection.uriText(python.uri), ...scopeArgument(mark.function, python) };
  }
}

/** A function by its name; the whole file as the place behind its last line. */
export function scopeArgument(name: string, document: vscode.TextDocument): Argument {
  const last = document.lineAt(document.lineCount - 1);
  const line = last.text === "" ? last.lineNumber : last.lineNumber + 1;
  return name !== "" ? { function: name } : { position: { line, character: 0 } };
}
