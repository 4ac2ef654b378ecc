// The commands `planpatch.ui.*`. Each reads as: what is meant, what does the user want, tell the server, tell the user.

import * as vscode from "vscode";
import { AlreadyTold, type Connection, thisMachine } from "./connection";
import { findBasePython } from "./discovery";
import { hasNvidia, InstallError } from "./environment";
import { History } from "./history";
import { askForIntent, type Place } from "./intent";
import { ServerGone } from "./jobs";
import { type LedgerView, type Node } from "./ledgerView";
import { NO_FILTER } from "./ledgerModel";
import { type PlanView, scopeArgument } from "./planView";
import { type Adapters, type Argument, type Entry, type Job, type ModelInfo, type Models, PULL_ID } from "./protocol";
import { openDiff, type Reviews } from "./review";
import { bytes, cancellable, evaluationWords, type Row } from "./statusModel";
import type { StatusView } from "./statusView";
import { failureOf } from "./failures";
import { said, serverError, tellFailure } from "./telling";
import { SCHEME, type Texts } from "./texts";

const { t } = vscode.l10n;

/** What neither starts a server nor writes anything. */
const NEED_NO_TRUST = new Set(["showStatus", "showLog", "doctor", "walkthrough"]);

export interface Parts {
  connection: Connection;
  texts: Texts;
  reviews: Reviews;
  plans: PlanView;
  ledger: LedgerView;
  status: StatusView;
}

export function registerCommands(context: vscode.ExtensionContext, parts: Parts): void {
  const { connection, texts, reviews, plans, ledger, status } = parts;
  const history = new History(context.globalState, () => connection.own.historySize);
  connection.complete = (command, argument) => complete(connection, command, argument, history);

  /** The file of the active editor, also where that shows a diff of it. */
  function activeFile(): vscode.Uri {
    const uri = vscode.window.activeTextEditor?.document.uri;
    const file = uri === undefined ? undefined : texts.fileOf(uri);
    if (file?.scheme !== "file" || !/\.pyi?$/.test(file.path)) {
      throw new UserError(t("Open a Python file first."));
    }
    return file;
  }

  const commands: Record<string, (...args: unknown[]) => unknown> = {
    // writing
    plan: (given) => generate("planpatch.plan", given as Argument | undefined),
    patch: (given) => generate("planpatch.patch", given as Argument | undefined),
    preset: () => preset(),
    fix: () => fix(),
    patchFromPlan: (uri) => fromPlan("planpatch.patch", uri),
    planAgain: (uri) => fromPlan("planpatch.plan", uri),
    openPlan: () => openPlan(),
    // reviewing
    apply: (which) => (isPending(which) ? reviews.apply(idOf(which)) : applyFromLedger(which)),
    reject: (which) => (isPending(which) ? reviews.reject(idOf(which)) : rejectFromLedger(which)),
    preview: (which) => reviews.preview(idOf(which)),
    acceptHunk: (id, hunk) => reviews.decide("accepted", idOf(id), hunk as number | undefined),
    rejectHunk: (id, hunk) => reviews.decide("rejected", idOf(id), hunk as number | undefined),
    nextHunk: () => reviews.goTo(1),
    previousHunk: () => reviews.goTo(-1),
    showDiff: (which) => showDiff(which),
    retry: (which) => retry(which as { patchId?: string; uri?: string; asItWas?: boolean } | undefined),
    // history
    rollback: (which) => turn("planpatch.rollback", which),
    redo: (which) => turn("planpatch.redo", which),
    keep: (which) => keep(which),
    openLedger: () => ledger.open(),
    why: (which) => ledger.why(needId(which)),
    filterLedger: () => ledger.askFilter(),
    clearLedgerFilter: () => ledger.setFilter(NO_FILTER),
    moreLedger: () => ledger.showMore(),
    groupLedger: () => ledger.group(),
    refreshLedger: () => ledger.refresh(),
    // the server
    cancel: (node) => cancel(node),
    chooseModel: () => chooseModel(),
    chooseAdapter: () => chooseAdapter(),
    pull: (which) => pull(which === "current"),
    showStatus: () => status.show(),
    showLog: () => connection.log.show(),
    doctor: () => doctor(),
    install: () => install(),
    choosePython: () => choosePython(),
    restart: () => connection.restart(),
    walkthrough: () =>
      vscode.commands.executeCommand("workbench.action.openWalkthrough", "planpatch.planpatch#start", false),
  };
  for (const [name, work] of Object.entries(commands)) {
    const run = (...args: unknown[]): Promise<unknown> =>
      shown(() => {
        if (!NEED_NO_TRUST.has(name)) {
          connection.checkTrust(); // first of all: nobody types an intent in vain
        }
        return work(...args);
      });
    context.subscriptions.push(vscode.commands.registerCommand(`planpatch.ui.${name}`, run));
  }

  // --- writing --------------------------------------------------------------------------------------------------------------

  async function generate(command: "planpatch.plan" | "planpatch.patch", given?: Argument): Promise<Job | undefined> {
    const place = given?.uri === undefined ? placeArgument() : given;
    const failure = connection.status === null ? null : failureOf(connection.status);
    if (failure !== null) {
      tellFailure(failure); // before anything is typed
      return undefined;
    }
    const argument = await complete(connection, command, place, history);
    return argument === undefined ? undefined : await connection.job(command, argument);
  }

  async function preset(): Promise<void> {
    const place = placeArgument();
    const { presets = {} } = await connection.askStatus(activePython().document.uri);
    const items = Object.entries(presets).map(([name, title]) => ({ label: title, description: name, name }));
    const chosen = await vscode.window.showQuickPick(items, { title: t("PlanPatch: use a preset") });
    if (chosen !== undefined) {
      await connection.job("planpatch.patch", { ...place, preset: chosen.name });
    }
  }

  async function fix(): Promise<void> {
    const { document, selection } = activePython();
    const found = vscode.languages
      .getDiagnostics(document.uri)
      .filter((one) => one.source !== "planpatch" && one.range.intersection(selection) !== undefined);
    const chosen =
      found.length < 2
        ? found[0]
        : (
            await vscode.window.showQuickPick(
              found.map((one) => ({ label: one.message, description: one.source ?? "", one })),
              { title: t("PlanPatch: fix which problem?") },
            )
          )?.one;
    if (found.length === 0) {
      throw new UserError(t("There is no problem at the cursor."));
    }
    if (chosen !== undefined) {
      const { start, end } = chosen.range;
      const diagnostic = {
        message: chosen.message,
        source: chosen.source,
        code: typeof chosen.code === "object" ? chosen.code.value : chosen.code,
        range: { start: place(start), end: place(end) },
      };
      const uri = connection.uriText(document.uri);
      await connection.job("planpatch.patch", { uri, range: diagnostic.range, diagnostic });
    }
  }

  async function fromPlan(command: "planpatch.plan" | "planpatch.patch", given: unknown): Promise<void> {
    const argument = await plans.argument(given instanceof vscode.Uri ? given : undefined);
    if (argument === null) {
      throw new UserError(t("This is no plan, or it could not be saved."));
    }
    await connection.job(command, command === "planpatch.patch" ? { ...argument, planId: "document" } : argument);
  }

  async function openPlan(): Promise<void> {
    const { plans: known = [] } = await connection.askStatus(activeFile());
    const items = known.map((one) => ({
      label: one.function === "" ? t("the whole file") : one.function,
      description: one.intent,
      file: one.file,
    }));
    const chosen = items.length < 2 ? items[0] : await vscode.window.showQuickPick(items, { title: t("Open which plan?") });
    if (items.length === 0) {
      throw new UserError(t("There is no plan for this file yet."));
    }
    if (chosen !== undefined) {
      await connection.openDocument(vscode.Uri.file(chosen.file));
    }
  }

  // --- reviewing ------------------------------------------------------------------------------------------------------------

  function isPending(which: unknown): boolean {
    const id = idOf(which);
    return id === undefined || reviews.find(id) !== null;
  }

  async function applyFromLedger(which: unknown): Promise<void> {
    const job = await connection.job("planpatch.apply", { patchId: needId(which) });
    if (job.ok === false && job.reason !== undefined) {
      throw new UserError(job.reason);
    }
  }

  async function rejectFromLedger(which: unknown): Promise<void> {
    await connection.command("planpatch.reject", { patchId: needId(which) });
    ledger.refresh();
  }

  async function showDiff(which: unknown): Promise<void> {
    const id = idOf(which);
    if (id === undefined || reviews.find(id) !== null) {
      await reviews.showDiff(id);
    } else {
      await openDiff(texts, await ledger.entry(id));
    }
  }

  /** Ask again, with what was wrong: of a patch that waits, else of the last one that was refused in the file. */
  async function retry(which?: { patchId?: string; uri?: string; asItWas?: boolean }): Promise<void> {
    const pending = which?.uri === undefined ? reviews.find(which?.patchId) : null;
    const uri = which?.uri === undefined ? vscode.window.activeTextEditor?.document.uri : vscode.Uri.parse(which.uri);
    const refused = pending === null && uri !== undefined ? reviews.refusal(uri) : undefined;
    const before = refused === undefined ? undefined : connection.argumentOf(refused.jobId);
    if (pending === null && before === undefined) {
      throw new UserError(t("There is no patch to try again here."));
    }
    if (which?.asItWas === true && pending !== null) {
      await connection.job("planpatch.patch", await argumentOf(pending.entry, pending.uri)); // for the text as it is now
      return;
    }
    const hint = await vscode.window.showInputBox({
      title: t("PlanPatch: retry with feedback"),
      prompt: t("What was wrong, and what should be done instead?"),
      ignoreFocusOut: true,
    });
    if (hint === undefined) {
      return;
    }
    const reason = refused?.error?.message ?? "The user did not accept the last patch.";
    const argument = pending === null ? before : await argumentOf(pending.entry, pending.uri);
    await connection.job("planpatch.patch", { ...argument, feedback: { reason, hint }, fresh: true });
  }

  async function argumentOf(entry: Entry, uri: vscode.Uri): Promise<Argument> {
    const document = await vscode.workspace.openTextDocument(uri);
    return { uri: connection.uriText(uri), ...scopeArgument(entry.scope, document), intent: entry.intent };
  }

  // --- history --------------------------------------------------------------------------------------------------------------

  async function turn(command: "planpatch.rollback" | "planpatch.redo", which: unknown): Promise<void> {
    const id = idOf(which);
    const argument: Argument = id === undefined ? { uri: connection.uriText(activeFile()) } : { patchId: id };
    const job = await connection.job(command, argument);
    if (job.ok === true) {
      const words = command === "planpatch.rollback" ? t("PlanPatch: rolled back.") : t("PlanPatch: applied again.");
      vscode.window.setStatusBarMessage(words, 5000);
    } else if (job.error === undefined && job.reason !== undefined) {
      throw new UserError(job.reason);
    }
  }

  async function keep(which: unknown): Promise<void> {
    await connection.command("planpatch.feedback", { patchId: needId(which), feedback: { accepted: true } });
    ledger.refresh();
  }

  // --- the server -----------------------------------------------------------------------------------------------------------

  async function cancel(node: unknown): Promise<void> {
    const named = node as { job?: Job; row?: Row } | undefined;
    const known = cancellable(connection.jobs.running(), connection.status, t);
    if (known.length === 0) {
      throw new UserError(t("Nothing is running."));
    }
    const jobId = named?.job?.jobId ?? (named?.row === undefined ? await pickJob(known) : PULL_ID);
    if (jobId !== undefined) {
      await connection.command("planpatch.cancel", { jobId });
    }
  }

  async function pickJob(known: ReturnType<typeof cancellable>): Promise<string | undefined> {
    const items = known.map((job) => ({ label: job.title, description: job.function, id: job.jobId }));
    const chosen = items.length < 2 ? items[0] : await vscode.window.showQuickPick(items, { title: t("Cancel which job?") });
    return chosen?.id;
  }

  async function chooseModel(): Promise<void> {
    const { models, model } = await connection.command<Models>("planpatch.model");
    const chosen = await pickModel(models, model, t("Choose a model"));
    if (chosen !== undefined) {
      await setSetting("model", chosen);
    }
  }

  async function chooseAdapter(): Promise<void> {
    const { adapters } = await connection.command<Adapters>("planpatch.adapter");
    const items = [
      { label: t("Automatic"), description: "auto", detail: t("The adapter that training promoted"), name: "auto" },
      { label: t("Base model"), description: "", detail: t("No adapter"), name: "__none__" },
      ...adapters.map((one) => ({
        label: `${one.used ? "$(check) " : ""}${one.folder.split(/[\\/]/).at(-1) ?? one.folder}`,
        description: one.base,
        detail: one.state === "ok" ? evaluationWords(one.evaluation, t) || one.folder : one.state,
        name: one.folder,
      })),
    ];
    const chosen = await vscode.window.showQuickPick(items, { title: t("Choose an adapter"), matchOnDetail: true });
    if (chosen !== undefined) {
      await setSetting("adapter", chosen.name === "auto" ? undefined : chosen.name);
    }
  }

  async function pull(isCurrent: boolean): Promise<void> {
    if (!isCurrent) {
      const { models, model } = await connection.command<Models>("planpatch.model");
      const absent = models.filter((one) => one.state !== "ready");
      const chosen = await pickModel(absent, model, t("Download a model"));
      if (chosen === undefined) {
        return;
      }
      await setSetting("model", chosen);
    }
    await connection.command("planpatch.pull");
  }

  async function doctor(): Promise<void> {
    const title = t("PlanPatch: looking at this machine");
    const options = { location: vscode.ProgressLocation.Notification, title };
    const { stdout, stderr } = await vscode.window.withProgress(options, () => connection.runTool(["doctor", "--json"]));
    const uri = texts.set("doctor", "PlanPatch Doctor.md", doctorText(stdout, stderr));
    await vscode.window.showTextDocument(uri, { preview: true });
  }

  async function install(): Promise<void> {
    const { basePython, serverPackage, serverPipArgs } = connection.own;
    const workspaces = (vscode.workspace.workspaceFolders ?? []).map((folder) => folder.uri.fsPath);
    const python = findBasePython(basePython, thisMachine(), workspaces);
    if (python === null) {
      tellFailure({ kind: "noPython", detail: basePython ?? "" });
      return;
    }
    const title = t("PlanPatch: installing the server");
    const options = { location: vscode.ProgressLocation.Notification, title, cancellable: true };
    try {
      await vscode.window.withProgress(options, async (progress, token) => {
        const abort = new AbortController();
        token.onCancellationRequested(() => abort.abort());
        const installed = connection.environment.install({
          basePython: python,
          requirement: serverPackage,
          pipArgs: serverPipArgs,
          hasNvidia: hasNvidia(process.platform, process.env),
          platform: process.platform,
          progress: (step) => progress.report({ message: installWords(step) }),
          signal: abort.signal,
        });
        await connection.startsAfter(installed);
      });
    } catch (error) {
      if (!(error instanceof InstallError)) {
        throw error;
      }
      if (error.reason === "python") {
        tellFailure({ kind: "noPython", detail: error.message });
      } else if (error.reason !== "cancelled") {
        connection.log.error(error.message);
        tellFailure({ kind: "installFailed", detail: error.message });
      }
      return;
    }
    await connection.restart();
  }

  async function choosePython(): Promise<void> {
    const found = await vscode.window.showOpenDialog({ canSelectMany: false, title: t("Choose Python 3.10 or newer") });
    if (found?.[0] !== undefined) {
      await setSetting("basePython", found[0].fsPath);
      await install();
    }
  }
}

/** Asks what to do where nothing says it yet. */
async function complete(
  connection: Connection,
  command: string,
  argument: Argument,
  history: History,
): Promise<Argument | undefined> {
  const isSaid = [argument.intent, argument.preset, argument.diagnostic, argument.planId].some((one) => one !== undefined);
  if (isSaid) {
    return argument;
  }
  const isPlan = command === "planpatch.plan";
  const title = isPlan ? t("PlanPatch: plan a change") : t("PlanPatch: make a patch");
  const intent = await askForIntent(history, title, placeOf(connection, isPlan, argument), mayBeInCode(argument));
  if (intent === undefined) {
    return undefined;
  }
  await history.add(intent);
  return intent === "" ? argument : { ...argument, intent };
}

/** What would be changed, for the input box. */
async function placeOf(connection: Connection, isPlan: boolean, argument: Argument): Promise<Place | undefined> {
  const { target, plans } = await connection.askAbout(argument);
  if (target === undefined || target === null) {
    return undefined;
  }
  const what = target.function === "" ? t("the whole file") : target.function;
  return {
    title: isPlan ? t("PlanPatch: plan a change to {0}", what) : t("PlanPatch: make a patch of {0}", what),
    hasPlan: plans?.some((one) => one.function === target.function) === true,
  };
}

/** Whether a comment in the document may be a request. */
function mayBeInCode(argument: Argument): boolean {
  const uri = argument.uri === undefined ? undefined : vscode.Uri.parse(argument.uri).toString();
  const document = vscode.workspace.textDocuments.find((one) => one.uri.toString() === uri);
  return document === undefined || /#\s*pp:/i.test(document.getText());
}

async function pickModel(models: ModelInfo[], current: string, title: string): Promise<string | undefined> {
  const other = t("Another: a hub name, a folder or a .gguf file…");
  const items = [
    { label: t("Automatic"), description: "auto", detail: t("Chosen by this machine's GPU, CPU and memory"), name: "auto" },
    ...models.map((one) => ({
      label: `${one.name === current ? "$(check) " : ""}${one.name}`,
      description: [one.state, one.bytes > 0 ? bytes(one.bytes) : ""].filter((word) => word !== "").join(" · "),
      detail: one.use ?? "",
      name: one.name,
    })),
    { label: other, description: "", detail: "", name: "" },
  ];
  const chosen = await vscode.window.showQuickPick(items, { title, matchOnDetail: true });
  return chosen?.name === "" ? await vscode.window.showInputBox({ title, prompt: other }) : chosen?.name;
}

/** The user's own setting; the server hears of it. */
async function setSetting(name: string, value: string | undefined): Promise<void> {
  const settings = vscode.workspace.getConfiguration("planpatch");
  await settings.update(name, value, vscode.ConfigurationTarget.Global);
}

// --- what a command is about ------------------------------------------------------------------------------------------------

function activePython(): vscode.TextEditor {
  const editor = vscode.window.activeTextEditor;
  if (editor?.document.languageId !== "python" || editor.document.uri.scheme === SCHEME) {
    throw new UserError(t("Open a Python file and put the cursor into a function."));
  }
  if (editor.document.uri.scheme !== "file") {
    throw new UserError(t("Save the file first: PlanPatch edits files on disk."));
  }
  return editor;
}

/** The selection of the active Python editor. */
function placeArgument(): Argument {
  const { document, selection } = activePython();
  return { uri: document.uri.toString(), range: { start: place(selection.start), end: place(selection.end) } };
}

function place(position: vscode.Position): { line: number; character: number } {
  return { line: position.line, character: position.character };
}

/** The proposal that an argument names: an id, or a line of the ledger. */
function idOf(which: unknown): string | undefined {
  if (typeof which === "string") {
    return which;
  }
  const node = which as Node | undefined;
  return node?.kind === "proposal" ? node.summary.id : undefined;
}

function needId(which: unknown): string {
  const id = idOf(which);
  if (id === undefined) {
    throw new UserError(t("Choose a patch in the ledger."));
  }
  return id;
}

// --- what is said -------------------------------------------------------------------------------------------------------------

function installWords(step: string): string {
  return step === "venv" ? t("making an environment") : t("pip installs {0}; the log shows how far it is", step);
}

interface Check {
  name: string;
  level: string;
  detail: string;
  fix: string;
}

/** The doctor's checks as Markdown; what it said if it said anything else. */
export function doctorText(stdout: string, stderr: string): string {
  let checks: Check[];
  try {
    checks = (JSON.parse(stdout) as { checks: Check[] }).checks;
  } catch {
    return `# PlanPatch Doctor\n\n${t("The doctor did not answer.")}\n\n\`\`\`\n${stdout}${stderr}\n\`\`\`\n`;
  }
  const marks: Record<string, string> = { ok: "✓", warning: "⚠", problem: "✗" };
  const lines = checks.flatMap((check) => [
    `- ${marks[check.level] ?? "?"} **${check.name}**: ${check.detail.split("\n").join("  \n  ")}`,
    ...(check.fix === "" ? [] : ["", "  ```", ...check.fix.split("\n").map((line) => `  ${line}`), "  ```", ""]),
  ]);
  return `# PlanPatch Doctor\n\n${lines.join("\n")}\n`;
}

/** What the user did not know or forgot: a message is all there is to it. */
export class UserError extends Error {}

/** Show what went wrong; a bug goes on to the editor, which logs it. */
async function shown(work: () => unknown): Promise<unknown> {
  try {
    return await work();
  } catch (error) {
    const ours = serverError(error);
    if (ours !== null) {
      void vscode.window.showErrorMessage(`PlanPatch: ${said(ours)}`);
    } else if (error instanceof UserError) {
      void vscode.window.showWarningMessage(`PlanPatch: ${error.message}`);
    } else if (!(error instanceof AlreadyTold || error instanceof ServerGone)) {
      throw error;
    }
    return undefined;
  }
}
