// Registers what the user sees. Nothing is looked for and no server starts before a Python file is open or a command asks.

import * as vscode from "vscode";
import { registerCommands } from "./commands";
import { Connection } from "./connection";
import { LedgerView } from "./ledgerView";
import { PlanView } from "./planView";
import { Reviews } from "./review";
import { StatusView } from "./statusView";
import { SCHEME, Texts } from "./texts";

export function activate(context: vscode.ExtensionContext): void {
  const startedAt = performance.now();
  const log = vscode.window.createOutputChannel("PlanPatch", { log: true });
  const connection = new Connection(context, log);
  const texts = new Texts();
  context.subscriptions.push(
    log,
    connection,
    vscode.workspace.registerTextDocumentContentProvider(SCHEME, texts),
  );
  registerCommands(context, {
    connection,
    texts,
    reviews: new Reviews(context, connection, texts),
    plans: new PlanView(context, connection, texts),
    ledger: new LedgerView(context, connection, texts),
    status: new StatusView(context, connection),
  });
  connection.startIfWanted();
  log.info(`activated in ${(performance.now() - startedAt).toFixed(1)} ms`);
}

export function deactivate(): void {
  // what was registered is in context.subscriptions, and the editor disposes of it
}
