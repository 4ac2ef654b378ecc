// Registers what the user sees. Nothing is looked for and no server starts before a Python file is open or a command asks.

import * as vscode from "vscode";
import { registerCommands } from "./commands";
import { Connection } from "./connection";

export function activate(context: vscode.ExtensionContext): void {
  const startedAt = performance.now();
  const log = vscode.window.createOutputChannel("PlanPatch", { log: true });
  const connection = new Connection(context, log);
  context.subscriptions.push(log, connection);
  registerCommands(context, connection);
  connection.startIfWanted();
  log.info(`activated in ${(performance.now() - startedAt).toFixed(1)} ms`);
}

export function deactivate(): void {
  // what was registered is in context.subscriptions, and the editor disposes of it
}
