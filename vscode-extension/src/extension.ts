// Registers what the user sees. Nothing is looked for and no server starts before a Python file is open or a command asks.

import * as vscode from "vscode";
import { registerCommands } from "./commands";
import { Connection } from "./connection";
import { LedgerView } from "./ledgerView";
import { PlanView } from "./planView";
import { Reviews } from "./review";
import { StatusView } from "./statusView";
import { SCHEME, Texts } from "./texts";

let connection: Connection | undefined;

export function activate(context: vscode.ExtensionContext): void {
  const startedAt = performance.now();
  const log = vscode.window.createOutputChannel("PlanPatch", { log: true });
  const made = new Connection(context, log);
  connection = made;
  const texts = new Texts();
  context.subscriptions.push(
    log,
    made,
    vscode.workspace.registerTextDocumentContentProvider(SCHEME, texts),
  );
  registerCommands(context, {
    connection: made,
    texts,
    reviews: new Reviews(context, made, texts),
    plans: new PlanView(context, made, texts),
    ledger: new LedgerView(context, made, texts),
    status: new StatusView(context, made),
  });
  made.startIfWanted();
  log.info(`activated in ${(performance.now() - startedAt).toFixed(1)} ms`);
}

/** The editor waits for this, but not for what is in `subscriptions`. */
export async function deactivate(): Promise<void> {
  await connection?.close();
}
