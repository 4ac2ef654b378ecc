// One language client for the whole window. It starts with the first Python file, is started anew when what it depends on
// changes, and tells others of the server's status and jobs. vscode-languageclient is loaded here and not before.

import { type ChildProcess, type ChildProcessWithoutNullStreams, spawn } from "node:child_process";
import { existsSync, mkdirSync, statSync } from "node:fs";
import { homedir } from "node:os";
import * as vscode from "vscode";
import type { LanguageClient, LanguageClientOptions } from "vscode-languageclient/node";
import { findServer, isCompatible, type Launch, type Machine, NotFoundError } from "./discovery";
import { PrivateEnvironment } from "./environment";
import { type Failure, type FailureKind, failureOf, startFailure, Told } from "./failures";
import { Jobs, ServerGone } from "./jobs";
import { type Argument, CLIENT_OPTIONS, type Job, SERVER_VERSIONS, type Started, type Status } from "./protocol";
import { Crashes, Restarts } from "./restarts";
import { needsRestart, type OwnSettings, ownSettings, serverSection } from "./settings";
import { tellFailure } from "./telling";

const SETTLE_MS = 300;
const STDERR_KEPT = 8000;
const START_MS = 60_000;
const END_MS = 2500; // it records what it did to the texts before it ends; on Windows a kill would cut that short
const START_JOBS = new Set(["planpatch.plan", "planpatch.patch"]);

export type ConnectionState = "off" | "starting" | "running" | "failed";

/** Asks the user for what a command lacks; undefined: they changed their mind. */
export type Complete = (command: string, argument: Argument) => Promise<Argument | undefined>;

export class Connection implements vscode.Disposable {
  readonly jobs = new Jobs();
  readonly environment: PrivateEnvironment;
  complete: Complete = (_, argument) => Promise.resolve(argument);
  openDocument: (uri: vscode.Uri) => Promise<boolean> = async (uri) => {
    await vscode.window.showTextDocument(uri, { viewColumn: vscode.ViewColumn.Beside, preview: false });
    return true;
  };

  private readonly changed = new vscode.EventEmitter<void>();
  /** The state, or what the server says of itself, is another now. */
  readonly onDidChange = this.changed.event;
  private readonly restarts = new Restarts(() => this.startAnew(), SETTLE_MS);
  private readonly crashes = new Crashes();
  private readonly told = new Told();
  private client: LanguageClient | null = null;
  private process: ChildProcess | null = null;
  private stderr = "";
  private exit: number | string | null = null;
  private settings: OwnSettings;
  private current: Status | null = null;
  private httpProblem = "";
  private stateNow: ConnectionState = "off";
  private readonly asked = new Map<string, Argument>();
  private isStopping = false;
  private isDisposed = false;
  launch: Launch | null = null;
  serverVersion = "";

  constructor(
    private readonly context: vscode.ExtensionContext,
    readonly log: vscode.LogOutputChannel,
  ) {
    this.settings = ownSettings(section());
    this.environment = new PrivateEnvironment(
      context.globalStorageUri.fsPath,
      context.asAbsolutePath("server"),
      (line) => log.info(line),
    );
    context.subscriptions.push(
      vscode.workspace.onDidChangeConfiguration((event) => {
        if (event.affectsConfiguration("planpatch")) {
          this.settingsChanged();
        }
      }),
      vscode.workspace.onDidGrantWorkspaceTrust(() => this.startIfWanted()),
      vscode.workspace.onDidOpenTextDocument((document) => {
        if (isPython(document)) {
          this.startIfWanted();
        }
      }),
    );
  }

  // --- what others see ------------------------------------------------------------------------------------------------

  get state(): ConnectionState {
    return this.stateNow;
  }

  /** What the server said last of itself; null before that and after its end. */
  get status(): Status | null {
    return this.current;
  }

  get own(): OwnSettings {
    return this.settings;
  }

  /** Start when a Python file is open and nothing speaks against it. */
  startIfWanted(): void {
    const isWanted = vscode.workspace.textDocuments.some(isPython);
    if (isWanted && vscode.workspace.isTrusted && this.stateNow === "off" && !this.restarts.isBusy) {
      this.restarts.request().catch(() => undefined); // told already
    }
  }

  /** Start the server anew, for the user. */
  async restart(): Promise<void> {
    this.crashes.forget();
    this.told.isNew(null);
    await this.restarts.request();
  }

  /** Where the workspace is not trusted: say so, and what to do, each time that it is asked for, and throw `AlreadyTold`. */
  checkTrust(): void {
    if (!vscode.workspace.isTrusted) {
      tellFailure({ kind: "untrusted", detail: "" });
      throw new AlreadyTold();
    }
  }

  /** The running client; starts it if need be. Throws `AlreadyTold` errors: the user knows already. */
  private async running(): Promise<LanguageClient> {
    this.checkTrust();
    if (this.restarts.isBusy || this.client === null) {
      this.told.isNew(null);
      await (this.restarts.underWay ?? this.restarts.request()); // a server that is starting will do
    }
    if (this.client === null) {
      throw new AlreadyTold();
    }
    return this.client;
  }

  /** Run a command of the server and return its answer. */
  async command<T>(name: string, argument: Argument = {}): Promise<T> {
    const client = await this.running();
    return await client.sendRequest<T>("workspace/executeCommand", { command: name, arguments: [argument] });
  }

  /** Run a command that begins a job and wait for the job's end. */
  async job(name: string, argument: Argument): Promise<Job> {
    const started = await this.command<Started>(name, argument);
    this.asked.set(started.jobId, argument);
    return await this.jobs.end(started.jobId);
  }

  /** What a job of this server was asked for with. */
  argumentOf(jobId: string): Argument | undefined {
    return this.asked.get(jobId);
  }

  /** Run `planpatch` with other arguments, such as the doctor's, and return what it wrote. */
  async runTool(args: string[]): Promise<{ stdout: string; stderr: string }> {
    const launch = this.launch ?? (await this.find());
    const child = this.spawnTool(launch, args);
    const [stdout, stderr] = await Promise.all([textOf(child.stdout), textOf(child.stderr), ended(child)]);
    return { stdout, stderr };
  }

  /** Ask the server what it is doing; with a document also what it knows of that. */
  async askStatus(uri?: vscode.Uri): Promise<Status> {
    return await this.command<Status>("planpatch.status", uri === undefined ? {} : { uri: this.uriText(uri) });
  }

  /** What the server is doing, and what a plan or a patch with this argument would change. */
  async askAbout({ uri, range, position }: Argument): Promise<Status> {
    return await this.command<Status>("planpatch.status", { uri, range, position });
  }

  /** A URI as the client writes it to the server. */
  uriText(uri: vscode.Uri): string {
    return this.client?.code2ProtocolConverter.asUri(uri) ?? uri.toString();
  }

  // --- starting and ending --------------------------------------------------------------------------------------------

  private async startAnew(): Promise<void> {
    await this.stop();
    if (this.isDisposed || !vscode.workspace.isTrusted) {
      return;
    }
    this.setState("starting");
    try {
      this.launch = await this.find();
      await this.start(this.launch);
    } catch (error) {
      const said = this.stderr !== "" || this.exit !== null ? startFailure(this.exit, this.stderr).detail : null;
      await this.stop();
      this.setState("failed");
      throw error instanceof NotFoundError
        ? this.fail(error.reason === "setting" ? "badPath" : "notInstalled", error.reason === "setting" ? error.message : "")
        : error instanceof AlreadyTold
          ? error
          : this.fail("cannotStart", `${this.launch?.command ?? ""}: ${said ?? (error as Error).message}`);
    }
  }

  private async find(): Promise<Launch> {
    const folders = vscode.workspace.workspaceFolders ?? [];
    return findServer(
      {
        serverPath: this.settings.serverPath,
        serverArgs: this.settings.serverArgs,
        environmentPython: this.environment.python(),
        interpreter: this.settings.useInterpreter && vscode.workspace.isTrusted ? await interpreter() : null,
        workspaces: folders.map((folder) => folder.uri.fsPath),
      },
      thisMachine(),
    );
  }

  private async start(launch: Launch): Promise<void> {
    const { LanguageClient, CloseAction, ErrorAction, RevealOutputChannelOn } = await import(
      "vscode-languageclient/node"
    );
    const options: LanguageClientOptions = {
      documentSelector: [{ language: "python", scheme: "file" }],
      outputChannel: this.log,
      revealOutputChannelOn: RevealOutputChannelOn.Never,
      initializationOptions: { ...CLIENT_OPTIONS, settings: serverSection(section()) },
      initializationFailedHandler: () => false,
      errorHandler: {
        error: () => ({ action: ErrorAction.Continue, handled: true }),
        closed: () => ({ action: CloseAction.DoNotRestart, handled: true }), // `processEnded` decides
      },
      middleware: {
        executeCommand: (command, args, next) => this.executeCommand(command, args, next),
        workspace: {
          configuration: (params) =>
            params.items.map((item) => (item.section === "planpatch" ? serverSection(section()) : null)),
        },
        window: {
          showDocument: async (params, token, next) => {
            const uri = vscode.Uri.parse(params.uri);
            return uri.scheme === "file" ? { success: await this.openDocument(uri) } : next(params, token);
          },
        },
      },
    };
    class QuietClient extends LanguageClient {
      override error(message: string, data?: unknown): void {
        super.error(message, data, false); // what the user has to know is told with its buttons
      }
    }
    const client = new QuietClient("planpatch", "PlanPatch", () => this.spawn(launch), options);
    client.onNotification("planpatch/status", (status: Status) => this.statusCame(client, status));
    client.onNotification("planpatch/job", (job: Job) => this.jobs.update(job));
    this.client = client;
    await withTimeout(client.start(), START_MS, () => this.notStarted());
    if (client.initializeResult === undefined) {
      throw this.notStarted(); // it ended before it answered, and `start` resolves all the same
    }
    this.serverVersion = client.initializeResult?.serverInfo?.version ?? "";
    this.log.info(`planpatch ${this.serverVersion} from ${launch.command} (${launch.source})`);
    if (!isCompatible(this.serverVersion, SERVER_VERSIONS)) {
      const wanted = `${SERVER_VERSIONS.atLeast} ≤ version < ${SERVER_VERSIONS.below}`;
      throw this.fail("version", `${launch.command}: planpatch ${this.serverVersion || "?"}; ${wanted}`);
    }
    this.setState("running");
    if (launch.source === "environment" && this.environment.isOutdated()) {
      tellFailure({ kind: "outdated", detail: "" });
    }
  }

  private spawn(launch: Launch): Promise<ChildProcess> {
    const child = this.spawnTool(launch, ["lsp"]);
    this.process = child;
    this.stderr = "";
    this.exit = null;
    child.stderr.on("data", (data: Buffer) => {
      this.stderr = (this.stderr + data.toString("utf8")).slice(-STDERR_KEPT);
    });
    child.once("exit", (code, signal) => this.processEnded(child, code ?? signal));
    return new Promise((resolve, reject) => {
      child.once("error", reject);
      child.once("spawn", () => resolve(child));
    });
  }

  /** Never in a workspace: its folder is the extension's own. */
  private spawnTool(launch: Launch, args: string[]): ChildProcessWithoutNullStreams {
    const folder = this.context.globalStorageUri.fsPath;
    mkdirSync(folder, { recursive: true });
    const env = { ...process.env, ...(this.settings.home === null ? {} : { PLANPATCH_HOME: this.settings.home }) };
    return spawn(launch.command, [...launch.args, ...args], { cwd: folder, env, windowsHide: true });
  }

  /** The process ended. On purpose: nothing; while it served: start again, or say that it crashes. */
  private processEnded(child: ChildProcess, exit: number | string | null): void {
    if (child !== this.process) {
      return;
    }
    this.process = null;
    this.exit = exit;
    if (this.isStopping || this.stateNow !== "running") {
      return; // `start` tells of one that never served
    }
    this.log.error(`the server ended: ${exit ?? "unknown"}`);
    this.forgetServer();
    if (this.crashes.record()) {
      this.setState("off");
      this.restarts.request().catch(() => undefined);
    } else {
      this.setState("failed");
      this.fail("crashed", startFailure(exit, this.stderr).detail);
    }
  }

  private notStarted(): Error {
    const failure = startFailure(this.exit, this.stderr);
    return this.fail(failure.kind, failure.detail);
  }

  private async stop(): Promise<void> {
    const [client, child] = [this.client, this.process];
    this.isStopping = true;
    try {
      this.forgetServer();
      if (client?.isRunning()) {
        await client.stop(2000).catch(() => undefined); // it is killed below
      }
      await client?.dispose(2000).catch(() => undefined);
      if (child !== null && !(await hasEnded(child, END_MS))) {
        child.kill();
      }
    } finally {
      this.process = null;
      this.isStopping = false;
    }
    if (this.stateNow !== "off") {
      this.setState("off");
    }
  }

  private forgetServer(): void {
    this.client = null;
    this.current = null;
    this.asked.clear();
    this.jobs.forgetAll();
  }

  /** End for good: the server is told, and gone when this resolves. */
  async close(): Promise<void> {
    this.isDisposed = true;
    await this.stop();
  }

  dispose(): void {
    void this.close();
    this.changed.dispose();
  }

  /** Have something done that nobody waits for; what goes wrong is logged, but for the end of the server, which is told. */
  inBackground(work: Promise<unknown>): void {
    work.catch((error: unknown) => {
      if (!(error instanceof AlreadyTold || error instanceof ServerGone || this.client === null)) {
        this.log.error(error instanceof Error ? error : String(error));
      }
    });
  }

  // --- what comes from the server ---------------------------------------------------------------------------------------

  private statusCame(client: LanguageClient, status: Status): void {
    if (client !== this.client) {
      return;
    }
    this.current = status;
    const failure = failureOf(status);
    const isKnown = status.reason === "cancelled"; // a download, by the user
    if (this.told.isNew(failure) && failure !== null && !isKnown) {
      tellFailure(failure);
    }
    if (status.httpProblem !== undefined && status.httpProblem !== this.httpProblem) {
      this.httpProblem = status.httpProblem;
      if (this.httpProblem !== "") {
        this.log.warn(this.httpProblem); // the status view says it too
        if (typeof section().port === "number") {
          tellFailure({ kind: "portTaken", detail: this.httpProblem });
        }
      }
    }
    this.changed.fire();
  }

  private async executeCommand(
    command: string,
    args: unknown[],
    next: (command: string, args: unknown[]) => vscode.ProviderResult<unknown>,
  ): Promise<unknown> {
    const argument = START_JOBS.has(command) ? await this.complete(command, args[0] ?? {}) : undefined;
    if (START_JOBS.has(command) && argument === undefined) {
      return undefined;
    }
    const answer: unknown = await next(command, argument === undefined ? args : [argument]);
    const jobId = (answer as Partial<Started> | null)?.jobId;
    if (argument !== undefined && jobId !== undefined) {
      this.asked.set(jobId, argument);
    }
    return answer;
  }

  // --- settings and messages --------------------------------------------------------------------------------------------

  private settingsChanged(): void {
    const before = this.settings;
    this.settings = ownSettings(section());
    if (needsRestart(before, this.settings) && this.stateNow !== "off") {
      void this.restart().catch(() => undefined);
    }
    this.changed.fire();
  }

  /** It is on its way while its environment is made; where that fails, it is as it was. */
  async startsAfter(work: Promise<unknown>): Promise<void> {
    const before = this.stateNow;
    if (before !== "running") {
      this.setState("starting");
    }
    try {
      await work;
    } catch (error) {
      this.setState(before);
      throw error;
    }
  }

  private setState(state: ConnectionState): void {
    this.stateNow = state;
    void vscode.commands.executeCommand("setContext", "planpatch.state", state);
    this.changed.fire();
  }

  private fail(kind: FailureKind, detail: string): AlreadyTold {
    const failure: Failure = { kind, detail };
    if (this.told.isNew(failure)) {
      this.log.error(`${kind}: ${detail}`);
      tellFailure(failure);
    }
    return new AlreadyTold();
  }
}

/** An error whose message the user has seen. */
export class AlreadyTold extends Error {}

export function section(): Record<string, unknown> {
  const found = vscode.workspace.getConfiguration().get<Record<string, unknown>>("planpatch");
  return { ...found };
}

export function isPython(document: vscode.TextDocument): boolean {
  return document.languageId === "python" && document.uri.scheme === "file";
}

export function thisMachine(): Machine {
  return {
    platform: process.platform,
    env: process.env,
    home: homedir(),
    isFile: (file) => existsSync(file) && statSync(file).isFile(),
  };
}

/** The interpreter that the user chose for the workspace, if the Python extension is there and knows one. */
async function interpreter(): Promise<string | null> {
  const extension = vscode.extensions.getExtension<{
    environments?: { getActiveEnvironmentPath(): { path: string } };
  }>("ms-python.python");
  const api = await extension?.activate();
  return api?.environments?.getActiveEnvironmentPath().path ?? null;
}

async function textOf(stream: NodeJS.ReadableStream): Promise<string> {
  const chunks: Buffer[] = [];
  for await (const chunk of stream) {
    chunks.push(chunk as Buffer);
  }
  return Buffer.concat(chunks).toString("utf8");
}

function ended(child: ChildProcess): Promise<void> {
  return new Promise((resolve, reject) => {
    child.once("error", reject);
    child.once("close", () => resolve());
  });
}

/** Whether a process that was asked to end does so in time. */
function hasEnded(child: ChildProcess, ms: number): Promise<boolean> {
  if (child.exitCode !== null || child.signalCode !== null) {
    return Promise.resolve(true);
  }
  return new Promise((resolve) => {
    const timer = setTimeout(() => resolve(false), ms);
    child.once("exit", () => {
      clearTimeout(timer);
      resolve(true);
    });
  });
}

async function withTimeout<T>(work: Promise<T>, ms: number, failure: () => Error): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(failure()), ms);
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}
