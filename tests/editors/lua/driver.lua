-- What every script here starts with: a Neovim set up as the guide says, a user who chooses from its menus, and checks
-- that end the script at the first one that does not hold.
--
--     nvim --clean --headless -l SCRIPT.lua FOLDER
--
-- FOLDER holds the guide's Lua blocks as files. The user's answers are put into `user` before the question comes.
local T = {
  user = { action = nil, answer = nil },
  menus = {}, -- titles of every code action menu, as lists
  questions = {}, -- messages of every window/showMessageRequest
  messages = {}, -- of every window/showMessage
  progress = {}, -- parameters of every $/progress
}
local PATIENCE_MS = 240 * 1000

function T.say(...)
  io.stdout:write(table.concat(vim.tbl_map(tostring, { ... }), ' '), '\n')
end

function T.fail(what)
  T.say('FAILED', what)
  T.say('messages:', vim.inspect(T.messages))
  T.say('questions:', vim.inspect(T.questions))
  T.say('last menu:', vim.inspect(T.menus[#T.menus]))
  T.say('buffer:', vim.inspect(vim.list_slice(T.lines(), 1, 40)))
  T.say('ledger, as last seen:', vim.inspect(T.last_ledger))
  T.say('printed:', vim.fn.execute('messages'))
  local log = io.open(vim.lsp.get_log_path())
  T.say('log:', log and log:read('*a'):sub(-4000) or 'none')
  io.stdout:flush()
  vim.cmd('cquit 1')
end

function T.check(holds, what)
  if not holds then
    T.fail(what)
  end
  T.say('ok', what)
end

--- Wait until something holds and return what it returned.
function T.wait(what, condition, patience_ms)
  local value
  vim.wait(patience_ms or PATIENCE_MS, function()
    value = condition()
    return value
  end, 30)
  T.check(value, what)
  return value
end

-- --- what the user sees ---------------------------------------------------------------------------------------------

function T.seen(list, text)
  return vim.iter(list):any(function(one)
    return one:find(text, 1, true) ~= nil
  end)
end

local function record(method, keep)
  local handler = vim.lsp.handlers[method]
  vim.lsp.handlers[method] = function(err, params, ctx)
    keep(params)
    return handler(err, params, ctx)
  end
end

record('window/showMessage', function(params)
  table.insert(T.messages, params.message)
end)
record('$/progress', function(params)
  table.insert(T.progress, params)
end)

local function starting_with(items, title_of, wanted)
  for index, item in ipairs(items) do
    if wanted and vim.startswith(title_of(item), wanted) then
      return item, index
    end
  end
end

-- Neovim asks the user through this function for code actions and for window/showMessageRequest alike.
vim.ui.select = function(items, opts, on_choice)
  if opts.kind == 'codeaction' then
    local function title_of(item)
      return item.action.title
    end
    table.insert(T.menus, vim.tbl_map(title_of, items))
    return on_choice(starting_with(items, title_of, T.user.action))
  end
  table.insert(T.questions, opts.prompt)
  local answer = T.user.answer
  if type(answer) == 'function' then
    answer = answer(opts.prompt)
  end
  on_choice(starting_with(items, function(item)
    return item.title
  end, answer))
end

-- --- what the user does ---------------------------------------------------------------------------------------------

function T.client()
  return vim.lsp.get_clients({ name = 'planpatch' })[1]
end

--- Set up as the guide says, with settings of the test, and open a file.
function T.start(file, blocks, settings)
  vim.cmd('filetype plugin on')
  vim.opt.runtimepath:prepend(vim.fn.stdpath('config')) -- which --clean leaves out
  for _, block in ipairs(blocks or { 'config' }) do
    dofile(vim.fs.joinpath(arg[1], block .. '.lua'))
  end
  if settings then
    vim.lsp.config('planpatch', { settings = { planpatch = settings } })
  end
  vim.cmd.edit(file)
  T.buffer = vim.api.nvim_get_current_buf()
  T.wait('the server is attached', function()
    local client = T.client()
    return client and client.initialized and client.attached_buffers[T.buffer]
  end)
end

--- Change settings while the server runs.
function T.set(settings)
  local client = T.client()
  client.settings = { planpatch = settings }
  client:notify('workspace/didChangeConfiguration', { settings = client.settings })
end

--- Put the cursor on the line that holds a text.
function T.go_to(text)
  vim.api.nvim_set_current_buf(T.buffer)
  for number, line in ipairs(T.lines()) do
    local column = line:find(text, 1, true)
    if column then
      return vim.api.nvim_win_set_cursor(0, { number, column - 1 })
    end
  end
  T.fail('no line holds ' .. text)
end

function T.lines()
  return vim.api.nvim_buf_get_lines(T.buffer, 0, -1, true)
end

--- Press keys, as a user does: what was changed before is an undo step of its own.
function T.press(keys)
  vim.api.nvim_feedkeys(vim.keycode(keys), 'tx', false)
end

--- The titles of the code action menu at the cursor; `wanted` is chosen if it is there.
function T.menu(wanted, open)
  local num_menus, num_printed = #T.menus, 0
  T.user.action = wanted
  T.press(open or 'gra') -- Neovim's own key for code actions
  vim.wait(3000, function()
    return #T.menus > num_menus
  end, 10)
  T.user.action = nil
  return T.menus[num_menus + 1] or {}
end

--- Open the menu until it holds an entry that starts so, and choose it.
function T.choose(wanted, open)
  T.wait('chosen: ' .. wanted, function()
    return vim.iter(T.menu(wanted, open)):any(function(title)
      return vim.startswith(title, wanted)
    end)
  end)
end

-- --- what is true ---------------------------------------------------------------------------------------------------

--- What `planpatch ledger list` says, newest first.
function T.ledger()
  local said = vim.system({ 'planpatch', 'ledger', 'list', '--json' }, { text = true }):wait()
  if said.code ~= 0 then
    T.fail('planpatch ledger list: ' .. said.stderr)
  end
  T.last_ledger = vim.json.decode(said.stdout)
  return T.last_ledger
end

--- Run a command of the server and return its result.
function T.command(name, argument)
  local params = { command = name, arguments = { argument or vim.empty_dict() } }
  local reply = assert(T.client():request_sync('workspace/executeCommand', params, 30000, T.buffer))
  return reply.result, reply.err
end

function T.wait_idle(patience_ms)
  T.wait('the server is idle', function()
    return #T.command('planpatch.status').jobs == 0
  end, patience_ms)
end

function T.bytes(file)
  local stream = assert(io.open(file, 'rb'))
  local bytes = stream:read('*a')
  stream:close()
  return bytes
end

--- Stop every server and leave.
function T.finish()
  local clients = vim.lsp.get_clients()
  for _, client in ipairs(clients) do
    client:stop()
  end
  T.wait('the server has ended', function()
    return #vim.lsp.get_clients() == 0
  end, 30000)
  T.say('all ok')
  vim.cmd('qa!')
end

return T
