// The input box: what should be changed? Earlier requests are listed below and filtered while the user types.

import * as vscode from "vscode";
import type { History } from "./history";

interface Item extends vscode.QuickPickItem {
  request: string;
}

/** The user's request; empty for what stands in the code or the plan document, undefined where they changed their mind. */
export function askForIntent(history: History, title: string): Promise<string | undefined> {
  const clear: vscode.QuickInputButton = {
    iconPath: new vscode.ThemeIcon("clear-all"),
    tooltip: vscode.l10n.t("Forget earlier requests"),
  };
  return new Promise((resolve) => {
    const box = vscode.window.createQuickPick<Item>();
    const offer = (): void => {
      const typed = box.value.trim();
      const first: Item =
        typed === ""
          ? { label: `$(comment) ${vscode.l10n.t("What the comment “# pp: …” in the function says")}`, request: "" }
          : { label: typed, request: typed, alwaysShow: true };
      const earlier = history.entries().filter((entry) => entry !== typed);
      box.items = [first, ...earlier.map((entry) => ({ label: entry, iconPath: new vscode.ThemeIcon("history"), request: entry }))];
    };
    let answer: string | undefined;
    box.title = title;
    box.placeholder = vscode.l10n.t("What should be changed?");
    box.buttons = history.entries().length === 0 ? [] : [clear];
    box.ignoreFocusOut = true;
    offer();
    box.onDidChangeValue(offer);
    box.onDidTriggerButton(async () => {
      await history.clear();
      box.buttons = [];
      offer();
    });
    box.onDidAccept(() => {
      answer = box.activeItems[0]?.request ?? box.value.trim();
      box.hide();
    });
    box.onDidHide(() => {
      box.dispose();
      resolve(answer);
    });
    box.show();
  });
}
