// The commands `planpatch.ui.*`. Each reads as: what is meant, what does the user want, tell the server, tell the user.

import * as vscode from "vscode";
import { AlreadyTold, type Connection } from "./connection";
import { History } from "./history";
import { askForIntent } from "./intent";
import { ServerGone } from "./jobs";
import type { Argument, Job } from "./protocol";
import { said, serverError } from "./telling";

export function registerCommands(context: vscode.ExtensionContext, connection: Connection): void {
  const history = new History(context.globalState, () => connection.own.historySize);
  connection.complete = (command, argument) => complete(command, argument, history);

  const register = (name: string, work: (...args: never[]) => Promise<unknown>): void => {
    const run = (...args: never[]): Promise<unknown> => shown(work(...args));
    context.subscriptions.push(vscode.commands.registerCommand(`planpatch.ui.${name}`, run));
  };

  register("plan", (given?: Argument) => generate("planpatch.plan", given));
  register("patch", (given?: Argument) => generate("planpatch.patch", given));
  register("cancel", () => cancel());
  register("showLog", () => Promise.resolve(connection.log.show()));
  register("restart", () => connection.restart());

  async function generate(command: "planpatch.plan" | "planpatch.patch", given?: Argument): Promise<Job | undefined> {
    const argument = await complete(command, given?.uri === undefined ? placeArgument(connection) : given, history);
    return argument === undefined ? undefined : await connection.job(command, argument);
  }

  async function cancel(): Promise<void> {
    const jobs = connection.jobs.running();
    const chosen =
      jobs.length < 2
        ? jobs[0]
        : (
            await vscode.window.showQuickPick(
              jobs.map((job) => ({ label: job.title, description: job.state, job })),
              { title: vscode.l10n.t("Cancel which job?") },
            )
          )?.job;
    if (chosen !== undefined) {
      await connection.command("planpatch.cancel", { jobId: chosen.jobId });
    } else if (jobs.length === 0) {
      vscode.window.showInformationMessage(vscode.l10n.t("PlanPatch: nothing is running."));
    }
  }
}

/** Asks what to do where nothing says it yet. */
async function complete(command: string, argument: Argument, history: History): Promise<Argument | undefined> {
  const isSaid =
    argument.intent !== undefined ||
    argument.preset !== undefined ||
    argument.diagnostic !== undefined ||
    argument.planId !== undefined;
  if (isSaid) {
    return argument;
  }
  const title = command === "planpatch.plan" ? vscode.l10n.t("PlanPatch: plan a change") : vscode.l10n.t("PlanPatch: make a patch");
  const intent = await askForIntent(history, title);
  if (intent === undefined) {
    return undefined;
  }
  await history.add(intent);
  return intent === "" ? argument : { ...argument, intent };
}

/** The selection of the active Python editor. */
export function placeArgument(connection: Connection): Argument {
  const editor = vscode.window.activeTextEditor;
  if (editor?.document.languageId !== "python") {
    throw new UserError(vscode.l10n.t("Open a Python file and put the cursor into a function."));
  }
  const { start, end } = editor.selection;
  return { uri: connection.uriText(editor.document.uri), range: { start: place(start), end: place(end) } };
}

function place(position: vscode.Position): { line: number; character: number } {
  return { line: position.line, character: position.character };
}

/** What the user did not know or forgot: a message is all there is to it. */
export class UserError extends Error {}

/** Show what went wrong; a bug goes on to the editor, which logs it. */
async function shown<T>(work: Promise<T>): Promise<T | undefined> {
  try {
    return await work;
  } catch (error) {
    const ours = serverError(error);
    if (error instanceof AlreadyTold || error instanceof ServerGone) {
      return undefined;
    }
    if (ours !== null) {
      void vscode.window.showErrorMessage(`PlanPatch: ${said(ours)}`);
      return undefined;
    }
    if (error instanceof UserError) {
      void vscode.window.showWarningMessage(`PlanPatch: ${error.message}`);
      return undefined;
    }
    throw error;
  }
}
