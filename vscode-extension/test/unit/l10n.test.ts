import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, test } from "vitest";

const ROOT = path.join(__dirname, "../..");
const read = (name: string): string => readFileSync(path.join(ROOT, name), "utf8");
const json = (name: string): Record<string, string> => JSON.parse(read(name)) as Record<string, string>;

/** Every string that the source puts into the user's language. */
function strings(): Set<string> {
  const found = new Set<string>();
  for (const name of readdirSync(path.join(ROOT, "src"))) {
    for (const [, text] of read(`src/${name}`).matchAll(/\bt\(\s*"((?:[^"\\]|\\.)*)"/g)) {
      found.add(JSON.parse(`"${text}"`) as string);
    }
  }
  return found;
}

const placeholders = (text: string): string[] => [...new Set(text.match(/\{\d\}/g))].sort();
const korean = json("l10n/bundle.l10n.ko.json");
const [english, titles] = [json("package.nls.json"), json("package.nls.ko.json")];

describe("Korean", () => {
  test("says all that the source says, and nothing that it does not say any more", () => {
    expect(Object.keys(korean).sort()).toEqual([...strings()].sort());
    expect(strings().size).toBeGreaterThan(100);
  });

  test("keeps every placeholder", () => {
    for (const [source, translated] of Object.entries(korean)) {
      expect(placeholders(translated), source).toEqual(placeholders(source));
    }
  });

  test("is Korean, but for what is a name in any language", () => {
    const isName = /^(Id|\{0\}: \{1\} \(PlanPatch\))$/;
    const foreign = Object.entries(korean).filter(([source, text]) => !isName.test(source) && !/[가-힣]/.test(text));
    expect(foreign).toEqual([]);
  });
});

describe("package.json", () => {
  const used = new Set([...read("package.json").matchAll(/"%([\w.]+)%"/g)].map(([, name]) => name as string));

  test("has every name in both languages, and no other", () => {
    expect(Object.keys(english).sort()).toEqual([...used].sort());
    expect(Object.keys(titles).sort()).toEqual([...used].sort());
  });

  test("links of descriptions lead to the same places in both", () => {
    const links = (text: string | undefined): string[] => text?.match(/command:[\w.]+|`[^`]*`/g)?.sort() ?? [];
    for (const name of [...used].filter((one) => /^(walkthrough|welcome)/.test(one))) {
      expect(links(titles[name]), name).toEqual(links(english[name]));
    }
  });

  test("names every command that is registered, and registers every command that it names", () => {
    const manifest = JSON.parse(read("package.json")) as {
      contributes: {
        commands: { command: string }[];
        keybindings: { command: string }[];
        menus: Record<string, { command?: string }[]>;
      };
    };
    const body = /const commands: Record<string, .*> = \{([\s\S]*?)\n {2}\};/.exec(read("src/commands.ts"))?.[1] ?? "";
    const registered = [...body.matchAll(/^ {4}(\w+): /gm)].map(([, name]) => `planpatch.ui.${name}`);
    const named = manifest.contributes.commands.map((one) => one.command);
    expect(named.sort()).toEqual(registered.sort());
    const { keybindings, menus } = manifest.contributes;
    for (const { command } of [...keybindings, ...Object.values(menus).flat()]) {
      expect(command === undefined || named.includes(command), command).toBe(true);
    }
  });
});
