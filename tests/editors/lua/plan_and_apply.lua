-- A directive, a plan that the user edits, a patch from it, "Apply", :write.
local T = dofile(vim.fs.joinpath(vim.fs.dirname(arg[0]), 'driver.lua'))
T.start('clamp.py', { 'config', 'keys' })

T.go_to('def clamp')
T.press('o# pp: return low when x is too small<Esc>')
T.choose('PlanPatch: plan a change to `clamp`', '\\pp')
T.wait('the plan document is open', function()
  return vim.api.nvim_buf_get_name(0):match('plans/.*%.md$')
end)
local plan = vim.api.nvim_buf_get_lines(0, 0, -1, true)
T.check(vim.tbl_contains(plan, '## Plan'), 'the document has a plan')

vim.cmd([[silent /^## Plan/+1,$delete _]])
vim.api.nvim_buf_set_lines(0, -1, -1, true, { '', '- When x < low, return low instead of high.' })
vim.cmd('silent write')

T.go_to('def clamp')
T.user.answer = 'Apply'
T.choose('PlanPatch: patch from plan')
T.wait('the patch is in the buffer', function()
  return not T.seen(T.lines(), '# pp:')
end)
T.check(T.seen(T.questions, 'PlanPatch has a patch for clamp'), 'the server asked first')
vim.cmd('silent write')
T.finish()
