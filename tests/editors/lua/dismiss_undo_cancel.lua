-- A question that is dismissed, "Apply: …" from the menu, one undo step, redo, "Reject: …", and jobs that are cancelled.
local T = dofile(vim.fs.joinpath(vim.fs.dirname(arg[0]), 'driver.lua'))
local status_lines = {}
vim.api.nvim_create_autocmd('LspProgress', {
  callback = function()
    table.insert(status_lines, vim.api.nvim_eval_statusline(vim.o.statusline, { maxwidth = 200 }).str)
  end,
})
T.start('clamp.py', { 'config', 'progress', 'cancel' })
local old = T.lines()

local function state()
  local newest = T.ledger()[1]
  return newest and newest.state .. ' ' .. newest.label
end

-- The preset's patch is asked about; the user dismisses the question and chooses "Apply" from the menu later.
T.go_to('def clamp')
T.choose('PlanPatch: add or mend the docstring')
T.wait('the server asked', function()
  return #T.questions == 1
end)
T.wait('a diagnostic says that a patch waits', function()
  local found = vim.diagnostic.get(T.buffer)[1]
  return found and found.severity == vim.diagnostic.severity.INFO and found.message:find('a patch waits', 1, true)
end)
T.check(vim.deep_equal(T.lines(), old) and state() == 'proposed unreviewed', 'a dismissed question changes nothing')
T.choose('PlanPatch: Apply: ')
T.wait('the patch is in the buffer', function()
  return not vim.deep_equal(T.lines(), old)
end)
local patched = T.lines()
T.wait('no diagnostic is left', function()
  return #vim.diagnostic.get(T.buffer) == 0
end)
T.wait('the ledger says applied', function()
  return state() == 'applied unreviewed'
end)

-- One undo step takes it out and is a verdict; redo takes the verdict back.
vim.cmd('silent undo')
T.check(vim.deep_equal(T.lines(), old), 'one undo step gives the old text')
T.wait('the ledger says rejected', function()
  return state() == 'rejected rejected'
end)
vim.cmd('silent redo')
T.check(vim.deep_equal(T.lines(), patched), 'redo gives the patched text')
T.wait('the ledger says applied again', function()
  return vim.startswith(state(), 'applied')
end)
vim.cmd('silent undo')
T.wait('the ledger says rejected again', function()
  return state() == 'rejected rejected'
end)

-- A patch that takes long is cancelled from the menu.
T.go_to('def long')
local function start_long_job()
  local num_progress = #T.progress
  T.choose('PlanPatch: add type hints')
  T.wait('it generates', function()
    for index = num_progress + 1, #T.progress do
      local token, value = T.progress[index].token, T.progress[index].value
      if value.kind == 'report' and value.message:find('PATCH: %d+ tokens') then
        return token
      end
    end
  end)
end
local lines_before = T.lines()
start_long_job()
T.check(T.seen(status_lines, 'PlanPatch: patch for long: PATCH: '), 'the status line shows it')
T.choose('PlanPatch: cancel ')
T.wait_idle(20000)
T.check(T.progress[#T.progress].value.kind == 'end', 'its progress has ended')

-- The same from progress, with the guide's command.
start_long_job()
vim.cmd('LspCancelProgress')
T.wait_idle(20000)
T.check(vim.deep_equal(T.lines(), lines_before), 'a cancelled job changes nothing')
T.check(not T.seen(T.menu(), 'PlanPatch: cancel'), 'nothing is left to cancel')
T.check(#T.ledger() == 1, 'a cancelled job leaves no proposal')

-- The server still works.
T.user.answer = 'Reject'
T.go_to('def clamp')
T.choose('PlanPatch: simplify')
T.wait('the server asked, or refused', function()
  return #T.questions == 2 or #vim.diagnostic.get(T.buffer) > 0
end)
T.finish()
