// Messages to the user, each with what can be done about it.

import * as vscode from "vscode";
import type { Failure, FailureKind, Remedy } from "./failures";
import { REMEDIES } from "./failures";
import type { ServerError } from "./protocol";

/** Show a failure with its buttons; nothing waits for the answer. */
export function tellFailure(failure: Failure): void {
  const titles = new Map(REMEDIES[failure.kind].map((remedy) => [remedyTitle(remedy), remedy]));
  const message = [failureText(failure.kind), failure.detail].filter((part) => part !== "").join(" ");
  const isMild = ["noModel", "portTaken", "untrusted", "outdated"].includes(failure.kind);
  const show = isMild ? vscode.window.showInformationMessage : vscode.window.showErrorMessage;
  const shown = show(`PlanPatch: ${message}`, ...titles.keys());
  void shown.then(async (title) => {
    const remedy = title === undefined ? undefined : titles.get(title);
    if (remedy !== undefined) {
      await applyRemedy(remedy);
    }
  });
}

export function failureText(kind: FailureKind): string {
  switch (kind) {
    case "untrusted":
      return vscode.l10n.t("This workspace is not trusted: until you trust it, nothing is planned, patched or written here.");
    case "notInstalled":
      return vscode.l10n.t("The server is not installed. It can be installed into an environment of its own; that takes 1.4 GB, with an NVIDIA GPU 6 GB.");
    case "badPath":
      return vscode.l10n.t("The server cannot be found.");
    case "noPython":
      return vscode.l10n.t("No Python 3.10 or newer was found to install the server with.");
    case "cannotStart":
      return vscode.l10n.t("The server does not start.");
    case "version":
      return vscode.l10n.t("This server and this extension do not belong together.");
    case "crashed":
      return vscode.l10n.t("The server ended three times in three minutes and is not started again.");
    case "noModel":
      return vscode.l10n.t("The model is not on this machine yet. Download it? It stays on this machine.");
    case "noMemory":
      return vscode.l10n.t("There is not enough memory for the model.");
    case "held":
      return vscode.l10n.t("Another window holds the memory that the model needs.");
    case "modelFailed":
      return vscode.l10n.t("The model cannot be loaded.");
    case "portTaken":
      return vscode.l10n.t("The port for HTTP is taken; editing is not affected.");
    case "outdated":
      return vscode.l10n.t("The extension brings a newer server than the one that is installed.");
    case "installFailed":
      return vscode.l10n.t("The server could not be installed.");
  }
}

function remedyTitle(remedy: Remedy): string {
  switch (remedy) {
    case "trust":
      return vscode.l10n.t("Manage Workspace Trust");
    case "install":
      return vscode.l10n.t("Install Server");
    case "update":
      return vscode.l10n.t("Update Server");
    case "settings":
      return vscode.l10n.t("Open Settings");
    case "basePython":
      return vscode.l10n.t("Choose Python…");
    case "log":
      return vscode.l10n.t("Show Log");
    case "doctor":
      return vscode.l10n.t("Run Doctor");
    case "restart":
      return vscode.l10n.t("Restart Server");
    case "pull":
      return vscode.l10n.t("Download Model");
    case "chooseModel":
      return vscode.l10n.t("Choose Model…");
  }
}

async function applyRemedy(remedy: Remedy): Promise<void> {
  const commands: Record<Remedy, string> = {
    trust: "workbench.trust.manage",
    install: "planpatch.ui.install",
    update: "planpatch.ui.install",
    settings: "workbench.action.openSettings",
    basePython: "planpatch.ui.choosePython",
    log: "planpatch.ui.showLog",
    doctor: "planpatch.ui.doctor",
    restart: "planpatch.ui.restart",
    pull: "planpatch.ui.pull",
    chooseModel: "planpatch.ui.chooseModel",
  };
  const args: Partial<Record<Remedy, string>> = { settings: "@ext:planpatch.planpatch", pull: "current" };
  await vscode.commands.executeCommand(commands[remedy], args[remedy]);
}

/** An error of the server as one sentence with its hint. */
export function said(error: ServerError): string {
  const message = error.message.replace(/\.$/, "");
  return error.hint === "" ? message : `${message}. ${error.hint}`;
}

/** Our error inside an answer of JSON-RPC; null if it is another one. */
export function serverError(error: unknown): ServerError | null {
  const data = typeof error === "object" && error !== null && "data" in error ? error.data : null;
  const isOurs = typeof data === "object" && data !== null && "code" in data && "message" in data && "hint" in data;
  return isOurs ? (data as ServerError) : null;
}
