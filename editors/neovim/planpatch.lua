-- PlanPatch in Neovim 0.11 or newer, with an input box for what you want and a window for the diff. Optional: everything
-- can be done from the code action menu too.
--
--     require('planpatch').setup() -- after vim.lsp.config('planpatch', …), before vim.lsp.enable('planpatch')
--
--     :[range]PlanPatch [intent]   patch the function at the cursor; without an intent you are asked for one
--     :PlanPatchDiff               show the last patch again
--     :PlanPatchCancel             cancel the job that runs
--     :PlanPatchRollback           take the last patch out of this file
--
-- In the window: `a` applies the patch, `r` rejects it, `q` closes the window and leaves the patch waiting. Keys that come
-- as it opens were meant for something else: `a` and `r` do nothing in the first half second.
local M = {}

local NAME = 'planpatch'
local QUESTION = 'window/showMessageRequest'
local DEAF_NS = 500 * 1000 * 1000

local last -- the last patch: { id, client_id, bufnr }

local function warn(message)
  vim.notify('PlanPatch: ' .. message, vim.log.levels.WARN)
end

local function client_of(bufnr)
  local client = vim.lsp.get_clients({ name = NAME, bufnr = bufnr })[1]
  if client == nil then
    warn('no server is attached to this buffer')
  end
  return client
end

--- Run a command of the server; `bufnr` is the Python buffer, whose newest text is sent first.
local function execute(client, bufnr, command, argument, on_result)
  local request = { title = command, command = command, arguments = { argument } }
  client:exec_cmd(request, { bufnr = bufnr }, function(err, result)
    if err then
      warn(err.message)
    elseif on_result then
      on_result(result)
    end
  end)
end

-- --- the window -----------------------------------------------------------------------------------------------------

local function open_window(lines, title, footer)
  local bufnr = vim.api.nvim_create_buf(false, true)
  vim.api.nvim_buf_set_lines(bufnr, 0, -1, true, lines)
  vim.bo[bufnr].bufhidden = 'wipe'
  vim.bo[bufnr].filetype = 'diff'
  vim.bo[bufnr].modifiable = false
  local longest = vim.iter(lines):fold(40, function(most, line)
    return math.max(most, vim.fn.strdisplaywidth(line))
  end)
  local width = math.max(1, math.min(longest + 1, vim.o.columns - 4))
  local height = math.max(1, math.min(#lines, vim.o.lines - 6))
  local window = vim.api.nvim_open_win(bufnr, true, {
    relative = 'editor',
    width = width,
    height = height,
    row = math.max(0, math.floor((vim.o.lines - height) / 2) - 1),
    col = math.max(0, math.floor((vim.o.columns - width) / 2)),
    border = 'rounded',
    title = ' ' .. title .. ' ',
    footer = ' ' .. footer .. ' ',
  })
  return bufnr, window
end

local function show(patch, entry)
  local waits = entry.state == 'proposed'
  local footer = waits and 'a apply   r reject   q close' or entry.state .. '   q close'
  local lines = vim.split(entry.diff, '\n', { trimempty = true })
  local bufnr, window = open_window(lines, 'PlanPatch: ' .. entry.intent:gsub('%s+', ' '), footer)

  local opened_at = vim.uv.hrtime()

  local function key(name, command)
    vim.keymap.set('n', name, function()
      if command and vim.uv.hrtime() - opened_at < DEAF_NS then
        return
      end
      vim.api.nvim_win_close(window, true)
      local client = vim.lsp.get_client_by_id(patch.client_id)
      if command and client then
        execute(client, patch.bufnr, command, { patchId = patch.id })
      end
    end, { buffer = bufnr, nowait = true })
  end

  key('q')
  key('<Esc>')
  if waits then
    key('a', 'planpatch.apply')
    key('r', 'planpatch.reject')
  end
end

--- Show the last patch in a window.
function M.diff()
  local patch = last
  local client = patch and vim.lsp.get_client_by_id(patch.client_id)
  if client == nil then
    return warn('there is no patch yet')
  end
  execute(client, patch.bufnr, 'planpatch.ledger', { patchId = patch.id }, function(entry)
    show(patch, entry)
  end)
end

-- --- what the server tells ------------------------------------------------------------------------------------------

local function on_job(_, job, context)
  if job.kind == 'patch' and job.state == 'done' and job.patchId then
    last = { id = job.patchId, client_id = context.client_id, bufnr = vim.uri_to_bufnr(job.uri) }
  end
end

--- The server's question whether to apply becomes the window; it is answered there, so here it is put aside.
local function on_question(err, params, context)
  for _, action in ipairs(params.actions or {}) do
    if action.title == 'Show diff' and last then
      vim.schedule(function()
        if vim.api.nvim_get_mode().mode == 'n' then
          M.diff()
        else
          vim.notify('PlanPatch: a patch is ready, :PlanPatchDiff shows it')
        end
      end)
      return vim.NIL
    end
  end
  return vim.lsp.handlers[QUESTION](err, params, context)
end

-- --- what the user says ---------------------------------------------------------------------------------------------

--- Patch the function at the cursor, or the one that holds the lines of a selection.
---@param intent string what to do
---@param lines? { [1]: integer, [2]: integer } first and last line, 1-based
function M.patch(intent, lines)
  local bufnr = vim.api.nvim_get_current_buf()
  local client = client_of(bufnr)
  if client == nil then
    return
  end
  vim.fn.histadd('input', intent)
  local place = vim.lsp.util.make_position_params(0, client.offset_encoding)
  local argument = { uri = place.textDocument.uri, position = place.position, intent = intent }
  if lines then
    argument.position = nil
    argument.range = { start = { line = lines[1] - 1, character = 0 }, ['end'] = { line = lines[2], character = 0 } }
  end
  execute(client, bufnr, 'planpatch.patch', argument)
end

local function patch_command(command)
  local lines = command.range == 2 and { command.line1, command.line2 } or nil
  if command.args ~= '' then
    return M.patch(command.args, lines)
  end
  vim.ui.input({ prompt = 'PlanPatch, what to do: ' }, function(intent)
    if intent and vim.trim(intent) ~= '' then
      M.patch(vim.trim(intent), lines)
    end
  end)
end

--- Cancel the job that runs.
function M.cancel()
  for _, client in ipairs(vim.lsp.get_clients({ name = NAME })) do
    execute(client, nil, 'planpatch.cancel', vim.empty_dict())
  end
end

--- Take the last patch out of the current file.
function M.rollback()
  local bufnr = vim.api.nvim_get_current_buf()
  local client = client_of(bufnr)
  if client then
    execute(client, bufnr, 'planpatch.rollback', { uri = vim.uri_from_bufnr(bufnr) })
  end
end

--- Make the commands, and tell the configuration of the server what is wanted of it.
function M.setup()
  vim.lsp.config(NAME, {
    init_options = { notifications = { 'planpatch/job' } },
    handlers = { ['planpatch/job'] = on_job, [QUESTION] = on_question },
  })
  local command = vim.api.nvim_create_user_command
  command('PlanPatch', patch_command, { nargs = '?', range = true, desc = 'Patch the function at the cursor' })
  command('PlanPatchDiff', M.diff, { desc = 'Show the last patch' })
  command('PlanPatchCancel', M.cancel, { desc = 'Cancel the running job' })
  command('PlanPatchRollback', M.rollback, { desc = 'Take the last patch out of this file' })
end

return M
