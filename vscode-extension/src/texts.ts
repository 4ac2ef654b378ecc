// Read-only documents of ours: both sides of a patch's diff, a plan while it is written, why a patch was refused.

import * as vscode from "vscode";

export const SCHEME = "planpatch";

export class Texts implements vscode.TextDocumentContentProvider {
  private readonly texts = new Map<string, string>();
  private readonly files = new Map<string, vscode.Uri>();
  private readonly changed = new vscode.EventEmitter<vscode.Uri>();
  readonly onDidChange = this.changed.event;

  provideTextDocumentContent(uri: vscode.Uri): string {
    return this.texts.get(uri.toString()) ?? "";
  }

  /** Set a text; an editor that shows it follows. `name` is what its tab says. */
  set(id: string, name: string, text: string): vscode.Uri {
    const uri = vscode.Uri.from({ scheme: SCHEME, path: `/${id}/${name}` });
    this.texts.set(uri.toString(), text);
    this.changed.fire(uri);
    return uri;
  }

  /** Say which file the texts of an id are about. */
  about(id: string, file: vscode.Uri): void {
    this.files.set(id, file);
  }

  /** The file that a document is about: itself, if it is none of ours. */
  fileOf(uri: vscode.Uri): vscode.Uri {
    return this.files.get(idOf(uri)) ?? uri;
  }

  /** Forget every text of an id and close its tabs. */
  async close(id: string): Promise<void> {
    const isOurs = (uri: vscode.Uri): boolean => uri.scheme === SCHEME && uri.path.startsWith(`/${id}/`);
    const tabs = vscode.window.tabGroups.all.flatMap((group) => group.tabs).filter((tab) => tabUris(tab).some(isOurs));
    if (tabs.length > 0) {
      await vscode.window.tabGroups.close(tabs, true);
    }
    for (const key of [...this.texts.keys()].filter((one) => isOurs(vscode.Uri.parse(one)))) {
      this.texts.delete(key);
    }
  }
}

/** The id that a document of ours belongs to; "" for any other. */
export function idOf(uri: vscode.Uri): string {
  return uri.scheme === SCHEME ? (uri.path.split("/")[1] ?? "") : "";
}

/** The column beside a Python file's: plans and diffs share it, however many of them come. */
export function besideColumn(python?: vscode.Uri): vscode.ViewColumn {
  const editors = vscode.window.visibleTextEditors.filter((editor) =>
    python === undefined ? editor.document.languageId === "python" : editor.document.uri.fsPath === python.fsPath,
  );
  const own = editors.find((editor) => editor === vscode.window.activeTextEditor) ?? editors[0];
  return own?.viewColumn === undefined ? vscode.ViewColumn.Beside : Math.min(own.viewColumn + 1, vscode.ViewColumn.Nine);
}

function tabUris(tab: vscode.Tab): vscode.Uri[] {
  const input: unknown = tab.input;
  return input instanceof vscode.TabInputTextDiff
    ? [input.original, input.modified]
    : input instanceof vscode.TabInputText
      ? [input.uri]
      : [];
}
