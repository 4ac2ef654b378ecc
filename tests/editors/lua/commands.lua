-- The optional planpatch.lua: the input box and its history, the window with the diff and its keys, cancel, roll back.
local T = dofile(vim.fs.joinpath(vim.fs.dirname(arg[0]), 'driver.lua'))
T.start('clamp.py', { 'config', 'optional' })
local old = T.lines()
local intent = 'return low when x is too small'

local function wait_for_window()
  T.wait('the window with the diff is open', function()
    return vim.api.nvim_win_get_config(0).relative ~= '' and vim.bo.filetype == 'diff'
  end)
  return vim.api.nvim_buf_get_lines(0, 0, -1, true)
end

T.go_to('def clamp')
T.press(':PlanPatch<CR>' .. intent .. '<CR>')
local diff = wait_for_window()
T.check(T.seen(diff, '-        return high') and T.seen(diff, '@@'), 'it shows a diff')
T.check(T.ledger()[1].intent == intent, 'the intent is what was typed')
T.press('q')
T.check(vim.api.nvim_get_current_buf() == T.buffer, 'q closes it')
T.check(T.ledger()[1].state == 'proposed' and vim.deep_equal(T.lines(), old), 'and decides nothing')

vim.cmd('PlanPatchDiff')
wait_for_window()
T.press('a')
T.check(vim.bo.filetype == 'diff' and T.ledger()[1].state == 'proposed', '`a` does nothing at first')
vim.wait(600)
T.press('a')
T.wait('`a` puts the patch into the buffer', function()
  return not vim.deep_equal(T.lines(), old)
end)
T.wait('the ledger says applied', function()
  return T.ledger()[1].state == 'applied'
end)
vim.cmd('PlanPatchRollback')
T.wait('the old text is back', function()
  return vim.deep_equal(T.lines(), old)
end)
T.wait('the ledger says rolled back', function()
  return T.ledger()[1].state == 'rolled_back'
end)

-- The history: the same intent again, by the arrow key.
T.press(':PlanPatch<CR><Up><CR>')
wait_for_window()
vim.wait(600)
T.press('r')
T.wait('`r` is a verdict', function()
  return T.ledger()[1].state == 'rejected' and T.ledger()[1].intent == intent
end)
T.check(vim.deep_equal(T.lines(), old), 'the buffer is as it was')

T.go_to('def long')
vim.cmd('PlanPatch Add type hints to every parameter.')
T.wait('it generates', function()
  local job = T.command('planpatch.status').jobs[1]
  return job and job.numTokens > 0
end)
vim.cmd('PlanPatchCancel')
T.wait_idle(20000)
T.check(#T.questions == 0, 'no menu was shown')
T.check(vim.deep_equal(T.lines(), old), 'the buffer is as it was')
T.finish()
