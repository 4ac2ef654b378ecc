-- A patch that is refused for its token budget, "retry with this error" once the setting is raised, and apply = 'direct'.
local T = dofile(vim.fs.joinpath(vim.fs.dirname(arg[0]), 'driver.lua'))
local too_few = { max_new_tokens = 1, tokens_per_function_token = 1, extra_tokens = 0 }
T.start('clamp.py', { 'config' }, { patch = too_few })
local old = T.lines()

T.go_to('def clamp')
T.choose('PlanPatch: add type hints')
local found = T.wait('a diagnostic says why it was refused', function()
  return vim.diagnostic.get(T.buffer)[1]
end)
T.check(found.severity == vim.diagnostic.severity.INFO and found.source == 'planpatch', 'it is information of PlanPatch')
T.check(found.code == 'tokens' and found.message:find('reached its limit of %d+ tokens'), 'it names the budget')
T.check(found.lnum == vim.api.nvim_win_get_cursor(0)[1] - 1, 'it stands at the function')
T.wait('a message says it too', function()
  return T.seen(T.messages, 'reached its limit')
end)
T.check(vim.deep_equal(T.lines(), old) and #T.questions == 0, 'the buffer is as it was')
T.check(T.ledger()[1].state == 'refused', 'the ledger says refused')

T.set({ patch = vim.empty_dict() })
T.user.answer = 'Apply'
T.choose('PlanPatch: retry with this error: The PATCH reached its limit')
T.wait('the retried patch is in the buffer', function()
  return not vim.deep_equal(T.lines(), old)
end)
T.wait('no diagnostic is left', function()
  return #vim.diagnostic.get(T.buffer) == 0
end)
T.wait('the ledger says applied', function()
  return T.ledger()[1].state == 'applied'
end)
T.check(#T.questions == 1, 'the server asked once')
local retried = T.lines()

T.set({ apply = 'direct' })
vim.cmd('let &undolevels = &undolevels') -- as a key between two commands does
local row = vim.fn.search('def clamp', 'nw') - 1
T.command('planpatch.patch', {
  uri = vim.uri_from_bufnr(T.buffer),
  position = { line = row, character = 0 },
  intent = 'rename the parameter x to value',
})
T.wait('the second patch is in the buffer', function()
  return not vim.deep_equal(T.lines(), retried)
end)
T.wait('the ledger says applied of both', function()
  local states = vim.tbl_map(function(one)
    return one.state
  end, T.ledger())
  return vim.deep_equal(states, { 'applied', 'applied', 'refused' })
end)
T.check(#T.questions == 1, 'with apply = "direct" the server asks nothing')
vim.cmd('silent undo')
T.check(vim.deep_equal(T.lines(), retried), 'one undo step takes the second patch out')
T.finish()
