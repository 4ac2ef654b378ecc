// The ledger as a tree view: what was proposed, what became of it, and why what was refused was refused.

import * as vscode from "vscode";
import type { Connection } from "./connection";
import {
  abilities,
  baseName,
  type Filter,
  type Group,
  type Grouping,
  icon,
  isFiltered,
  type Leaf,
  NO_FILTER,
  pages,
  tree,
} from "./ledgerModel";
import type { Entry, Gate, LedgerPage, PatchState, Summary } from "./protocol";
import { said } from "./telling";
import { besideColumn, type Texts } from "./texts";

const { t } = vscode.l10n;

const PAGE = 500;
const SETTLE_MS = 400;

interface Fact {
  kind: "fact";
  label: string;
  value: string;
  icon: string;
  tooltip?: string;
}

interface More {
  kind: "more";
}

export type Node = Group | Leaf | Fact | More;

export class LedgerView implements vscode.TreeDataProvider<Node> {
  private readonly changed = new vscode.EventEmitter<void>();
  readonly onDidChangeTreeData = this.changed.event;
  private readonly view: vscode.TreeView<Node>;
  private grouping: Grouping;
  private filter: Filter = NO_FILTER;
  private numPages = 1;
  private timer: NodeJS.Timeout | undefined;

  constructor(
    private readonly context: vscode.ExtensionContext,
    private readonly connection: Connection,
    private readonly texts: Texts,
  ) {
    this.grouping = context.globalState.get<Grouping>("planpatch.ledgerGrouping") === "day" ? "day" : "file";
    this.view = vscode.window.createTreeView("planpatch.ledger", { treeDataProvider: this, showCollapseAll: true });
    context.subscriptions.push(
      this.view,
      this.changed,
      connection.onDidChange(() => this.refreshSoon()),
      { dispose: () => clearTimeout(this.timer) },
      this.view.onDidChangeVisibility(() => this.refreshSoon()),
    );
  }

  refresh(): void {
    this.changed.fire();
  }

  /** Jobs and statuses come in bursts; a view that nobody sees asks for nothing. */
  private refreshSoon(): void {
    clearTimeout(this.timer);
    if (this.view.visible) {
      this.timer = setTimeout(() => this.changed.fire(), SETTLE_MS);
    }
  }

  // --- the tree -----------------------------------------------------------------------------------------------------------

  async getChildren(node?: Node): Promise<Node[]> {
    if (node === undefined) {
      return await this.roots();
    }
    switch (node.kind) {
      case "file":
      case "day":
        return node.children;
      case "proposal":
        return facts(await this.entry(node.summary.id));
      case "fact":
      case "more":
        return [];
    }
  }

  private async roots(): Promise<Node[]> {
    if (this.connection.state !== "running") {
      return [];
    }
    const { proposals, more } = await pages(this.numPages, (before) =>
      this.connection.command<LedgerPage>("planpatch.ledger", { limit: PAGE, before, ...this.filter }),
    );
    const found = tree(proposals, this.grouping);
    this.view.message =
      found.length === 0 && isFiltered(this.filter) ? t("Nothing in the ledger fits the filter.") : undefined;
    return more ? [...found, { kind: "more" }] : found;
  }

  getTreeItem(node: Node): vscode.TreeItem {
    switch (node.kind) {
      case "file":
        return fileItem(node);
      case "day":
        return dayItem(node);
      case "proposal":
        return proposalItem(node.summary);
      case "more":
        return moreItem();
      case "fact": {
        const item = new vscode.TreeItem(node.label);
        item.description = node.value;
        item.tooltip = node.tooltip ?? node.value;
        item.iconPath = new vscode.ThemeIcon(node.icon);
        item.accessibilityInformation = { label: `${node.label}: ${node.value}` };
        return item;
      }
    }
  }

  // --- commands -----------------------------------------------------------------------------------------------------------

  async entry(id: string): Promise<Entry> {
    return await this.connection.command<Entry>("planpatch.ledger", { patchId: id });
  }

  async open(): Promise<void> {
    await this.connection.askStatus();
    await vscode.commands.executeCommand("planpatch.ledger.focus");
    this.refresh();
  }

  /** Older proposals too. */
  showMore(): void {
    this.numPages++;
    this.refresh();
  }

  async group(): Promise<void> {
    this.grouping = this.grouping === "file" ? "day" : "file";
    await this.context.globalState.update("planpatch.ledgerGrouping", this.grouping);
    this.refresh();
  }

  async askFilter(): Promise<void> {
    const text = await vscode.window.showInputBox({
      title: t("Filter the ledger"),
      prompt: t("Words in the request, function, file, model or reason of a refusal"),
      value: this.filter.text,
    });
    if (text === undefined) {
      return;
    }
    const states = await vscode.window.showQuickPick(
      STATES.map((state) => ({ label: stateName(state), state, picked: this.filter.states.includes(state) })),
      { title: t("Filter the ledger"), placeHolder: t("States to show; none for all"), canPickMany: true },
    );
    this.setFilter({ text, states: (states ?? []).map((one) => one.state) });
  }

  setFilter(filter: Filter): void {
    this.filter = filter;
    this.numPages = 1;
    void vscode.commands.executeCommand("setContext", "planpatch.ledgerFiltered", isFiltered(filter));
    this.refresh();
  }

  /** Every gate of a proposal, and the server's reason if it was refused. */
  async why(id: string): Promise<void> {
    const entry = await this.entry(id);
    const title = entry.state === "refused" ? t("Why this was refused") : t("What the gates said");
    const uri = this.texts.set(`why-${id}`, `${title}.md`, whyText(entry, title));
    await vscode.window.showTextDocument(uri, { viewColumn: besideColumn(), preview: true });
  }
}

const STATES: PatchState[] = ["proposed", "applied", "accepted", "rejected", "rolled_back", "refused", "diverged"];

export function stateName(state: PatchState): string {
  switch (state) {
    case "proposed":
      return t("waiting");
    case "refused":
      return t("refused");
    case "applied":
      return t("applied");
    case "diverged":
      return t("diverged");
    case "accepted":
      return t("accepted");
    case "rejected":
      return t("rejected");
    case "rolled_back":
      return t("rolled back");
    case "forgotten":
      return t("forgotten");
  }
}

function fileItem(group: Group): vscode.TreeItem {
  const name = group.name === "" ? t("pasted code") : baseName(group.name);
  const item = new vscode.TreeItem(name, vscode.TreeItemCollapsibleState.Expanded);
  if (group.name === "") {
    item.iconPath = new vscode.ThemeIcon("clippy");
  } else {
    const uri = vscode.Uri.file(group.name);
    item.resourceUri = uri;
    item.iconPath = vscode.ThemeIcon.File;
    item.description = vscode.workspace.asRelativePath(uri);
    item.tooltip = group.name;
  }
  return item;
}

function dayItem(group: Group): vscode.TreeItem {
  const day = new Date(`${group.name}T12:00:00`).toLocaleDateString(vscode.env.language, { dateStyle: "medium" });
  const item = new vscode.TreeItem(day, vscode.TreeItemCollapsibleState.Expanded);
  item.iconPath = new vscode.ThemeIcon("calendar");
  return item;
}

function proposalItem(summary: Summary): vscode.TreeItem {
  const what = summary.intent === "" ? summary.id : summary.intent;
  const item = new vscode.TreeItem(what, vscode.TreeItemCollapsibleState.Collapsed);
  const at = new Date(summary.created_at).toLocaleTimeString(vscode.env.language, { timeStyle: "short" });
  const seconds = summary.total_s ? `${summary.total_s.toFixed(1)} s` : "";
  const words = [summary.scope, stateName(summary.state), at, summary.model ?? "", seconds].filter((one) => one !== "");
  const { name, colour } = icon(summary);
  item.id = summary.id;
  item.description = words.join(" · ");
  item.tooltip = [what, ...words, summary.error].filter((one) => one !== "").join("\n");
  item.contextValue = abilities(summary);
  item.iconPath = new vscode.ThemeIcon(name, colour === undefined ? undefined : new vscode.ThemeColor(colour));
  item.accessibilityInformation = { label: [what, ...words].join(", ") };
  return item;
}

function moreItem(): vscode.TreeItem {
  const item = new vscode.TreeItem(t("Show more"));
  item.id = "more";
  item.iconPath = new vscode.ThemeIcon("ellipsis");
  item.command = { command: "planpatch.ui.moreLedger", title: t("Show more") };
  return item;
}

function facts(entry: Entry): Fact[] {
  const fact = (iconName: string, label: string, value: string, tooltip?: string): Fact[] =>
    value === "" ? [] : [{ kind: "fact", label, value, icon: iconName, ...(tooltip === undefined ? {} : { tooltip }) }];
  const { timings } = entry;
  const time =
    timings.total_s === undefined
      ? ""
      : t("{0} s, {1} tokens", timings.total_s.toFixed(1), timings.num_tokens ?? 0);
  return [
    ...(entry.error === null ? [] : fact("circle-slash", t("Refused"), said(entry.error))),
    ...entry.gates.flatMap((gate) => fact(gate.ok ? "pass" : "error", gate.gate, gateWords(gate))),
    ...fact("diff", t("Changes"), entry.edits.length === 0 ? "" : String(entry.edits.length)),
    ...fact("notebook", t("Plan"), entry.plan_text.split("\n").join("; "), entry.plan_text),
    ...fact("server", t("Model"), [entry.model, entry.edit_format].filter((one) => one !== "").join(" · ")),
    ...fact("watch", t("Time"), time),
    ...entry.events.flatMap((event) => fact("history", eventName(event.kind), timeOf(event.at), reasonOf(event.data))),
    ...fact("key", t("Id"), entry.id),
  ];
}

function gateWords(gate: Gate): string {
  return gate.ok ? t("passed") : gate.reason;
}

/** What a gate asks of a patch. */
function gateMeaning(gate: string): string {
  const meanings: Record<string, string> = {
    fresh: t("made for the text as it is"),
    schema: t("the edits are a valid list"),
    anchors: t("each edit's place is found by its text"),
    ast: t("the result is valid Python"),
    libcst: t("a second parser reads it too"),
    scope: t("nothing outside changes"),
    names: t("no name becomes undefined"),
    change: t("something changes"),
    layout: t("newlines, indentation and encoding are kept"),
  };
  return meanings[gate] ?? gate;
}

function timeOf(at: string): string {
  return new Date(at).toLocaleString(vscode.env.language, { dateStyle: "short", timeStyle: "medium" });
}

function reasonOf(data: Record<string, unknown>): string | undefined {
  return typeof data.reason === "string" && data.reason !== "" ? data.reason : undefined;
}

function eventName(kind: string): string {
  const names: Record<string, string> = {
    proposed: t("proposed"),
    refused: t("refused"),
    applying: t("about to be applied"),
    applied: t("applied"),
    apply_failed: t("not applied by the editor"),
    diverged: t("diverged"),
    accepted: t("accepted"),
    rejected: t("rejected"),
    rolled_back: t("rolled back"),
    redone: t("redone"),
    label: t("judged by what became of it"),
  };
  return names[kind] ?? kind;
}

function whyText(entry: Entry, title: string): string {
  const lines = [`# ${title}`, "", `${entry.scope === "" ? t("the whole file") : entry.scope}: ${entry.intent}`, ""];
  if (entry.error !== null) {
    lines.push(said(entry.error), "");
  }
  lines.push(`## ${t("Gates")}`, "");
  for (const gate of entry.gates) {
    lines.push(`- ${gate.ok ? "✓" : "✗"} **${gate.gate}** (${gateMeaning(gate.gate)}): ${gateWords(gate)}`);
  }
  if (entry.gates.length === 0) {
    lines.push(t("No gate was reached."));
  }
  return `${lines.join("\n")}\n`;
}
