// The status bar item and the status view: the model, its adapter, the queue, what is under way, and how long things took.

import * as vscode from "vscode";
import type { Connection } from "./connection";
import type { Adapters, Evaluation, Job, TrainingEnd } from "./protocol";
import { bar, cancellable, jobWords, type Row, rows, trainingEndWords } from "./statusModel";

const { t } = vscode.l10n;

type Node = { kind: "row"; row: Row } | { kind: "job"; job: Job };

export class StatusView implements vscode.TreeDataProvider<Node> {
  private readonly changed = new vscode.EventEmitter<void>();
  readonly onDidChangeTreeData = this.changed.event;
  private readonly item: vscode.StatusBarItem;
  private readonly view: vscode.TreeView<Node>;
  private adapter: string | null | undefined;
  private evaluation: Evaluation | null = null;
  private trainingEnd: TrainingEnd | null = null;
  private isDrawing = false;

  constructor(
    context: vscode.ExtensionContext,
    private readonly connection: Connection,
  ) {
    this.item = vscode.window.createStatusBarItem("planpatch.status", vscode.StatusBarAlignment.Right, 95);
    this.item.name = "PlanPatch";
    this.item.command = "planpatch.ui.showStatus";
    this.view = vscode.window.createTreeView("planpatch.status", { treeDataProvider: this });
    context.subscriptions.push(
      this.item,
      this.view,
      this.changed,
      connection.onDidChange(() => this.drawSoon()),
      { dispose: connection.jobs.listen(() => this.drawSoon()) },
      vscode.window.onDidChangeActiveTextEditor(() => this.drawSoon()),
    );
    this.draw();
  }

  async show(): Promise<void> {
    await vscode.commands.executeCommand("planpatch.status.focus");
  }

  /** Tokens come ten times a second. */
  private drawSoon(): void {
    if (!this.isDrawing) {
      this.isDrawing = true;
      setTimeout(() => {
        this.isDrawing = false;
        this.draw();
      }, 50);
    }
  }

  private draw(): void {
    const { status, state } = this.connection;
    const jobs = this.connection.jobs.running();
    const { text, label, severity } = bar(state, status, jobs, t);
    this.item.text = text;
    this.item.accessibilityInformation = { label, role: "button" };
    this.item.tooltip = this.tooltip();
    this.item.backgroundColor =
      severity === "none" ? undefined : new vscode.ThemeColor(`statusBarItem.${severity}Background`);
    const isPython = vscode.window.activeTextEditor?.document.languageId === "python";
    if (state !== "off" || isPython) {
      this.item.show();
    } else {
      this.item.hide();
    }
    void vscode.commands.executeCommand("setContext", "planpatch.jobRunning", cancellable(jobs, status, t).length > 0);
    void vscode.commands.executeCommand("setContext", "planpatch.modelReady", status?.state === "ready");
    if (status?.adapter !== this.adapter && state === "running") {
      this.adapter = status?.adapter;
      this.connection.inBackground(this.askFigures());
    }
    this.tellTrainingEnd(status?.trainingEnd ?? null);
    this.changed.fire();
  }

  /** It may have taken hours: whoever works on something else hears of its end, once. */
  private tellTrainingEnd(end: TrainingEnd | null): void {
    const isTold = end?.run === this.trainingEnd?.run && end?.state === this.trainingEnd?.state;
    this.trainingEnd = end;
    if (end === null || isTold) {
      return;
    }
    const words = `PlanPatch: ${trainingEndWords(end, t)}`;
    if (end.state !== "done") {
      void vscode.window.showWarningMessage(words);
      return;
    }
    const choose = t("Choose an adapter");
    void vscode.window.showInformationMessage(words, choose).then((chosen) => {
      if (chosen === choose) {
        void vscode.commands.executeCommand("planpatch.ui.chooseAdapter");
      }
    });
  }

  /** The adapter is another now: ask for its figures, once. */
  private async askFigures(): Promise<void> {
    const known = await this.connection.command<Adapters>("planpatch.adapter");
    this.evaluation = known.adapters.find((one) => one.used)?.evaluation ?? null;
    this.changed.fire();
  }

  private tooltip(): string {
    const { status, launch } = this.connection;
    const lines = status === null ? [] : rows(status, this.evaluation, t).map((row) => `${row.label}: ${row.value}`);
    return ["PlanPatch", ...lines, ...(launch === null ? [] : [launch.command])].join("\n");
  }

  getChildren(node?: Node): Node[] {
    const { status, state } = this.connection;
    if (node !== undefined || status === null || state !== "running") {
      return [];
    }
    return [
      ...this.connection.jobs.running().map((job): Node => ({ kind: "job", job })),
      ...rows(status, this.evaluation, t).map((row): Node => ({ kind: "row", row })),
    ];
  }

  getTreeItem(node: Node): vscode.TreeItem {
    if (node.kind === "job") {
      const item = new vscode.TreeItem(jobWords(node.job, t));
      item.id = node.job.jobId;
      item.description = node.job.title;
      item.iconPath = new vscode.ThemeIcon("loading~spin");
      item.contextValue = "job";
      item.accessibilityInformation = { label: `${jobWords(node.job, t)}, ${node.job.title}` };
      return item;
    }
    const { row } = node;
    const item = new vscode.TreeItem(row.label);
    item.id = row.id;
    item.description = row.value;
    item.tooltip = `${row.label}: ${row.value}`;
    item.iconPath = new vscode.ThemeIcon(row.icon);
    if (row.id === "model" && this.connection.status?.isPulling === true) {
      item.contextValue = "pull";
    }
    item.accessibilityInformation = { label: `${row.label}: ${row.value}` };
    return item;
  }
}
