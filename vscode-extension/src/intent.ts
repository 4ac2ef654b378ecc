// The input box: what should be changed? Earlier requests are listed below and filtered while the user types.

import * as vscode from "vscode";
import type { History } from "./history";

interface Item extends vscode.QuickPickItem {
  request: string;
}

/** What the server knows of the place: what would be changed, and whether that has a plan. */
export interface Place {
  title: string;
  hasPlan: boolean;
}

/**
 * The user's request; empty for what stands in the code or the plan document, undefined where they changed their mind.
 * `place` comes while the box is open; `hasDirective`: there is a comment that may be meant.
 */
export function askForIntent(
  history: History,
  title: string,
  place: Promise<Place | undefined>,
  hasDirective: boolean,
): Promise<string | undefined> {
  const clear: vscode.QuickInputButton = {
    iconPath: new vscode.ThemeIcon("clear-all"),
    tooltip: vscode.l10n.t("Forget earlier requests"),
  };
  return new Promise((resolve) => {
    const box = vscode.window.createQuickPick<Item>();
    let hasPlan = false;
    const offer = (): void => {
      const typed = box.value.trim();
      const written = hasDirective
        ? `$(comment) ${vscode.l10n.t("What the comment “# pp: …” in the function says")}`
        : `$(checklist) ${vscode.l10n.t("What its plan is for")}`;
      const first: Item[] =
        typed !== ""
          ? [{ label: typed, request: typed, alwaysShow: true }]
          : hasDirective || hasPlan
            ? [{ label: written, request: "" }]
            : [];
      const earlier = history.entries().filter((entry) => entry !== typed);
      box.items = [...first, ...earlier.map((entry) => ({ label: entry, iconPath: new vscode.ThemeIcon("history"), request: entry }))];
    };
    let answer: string | undefined;
    box.title = title;
    place.then(
      (known) => {
        box.title = known?.title ?? title;
        hasPlan = known?.hasPlan ?? false;
        offer();
      },
      () => undefined, // the command that follows says what is wrong
    );
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
      if (answer === "" && !hasDirective && !hasPlan) {
        return; // nothing was asked for yet
      }
      box.hide();
    });
    box.onDidHide(() => {
      box.dispose();
      resolve(answer);
    });
    box.show();
  });
}
