-- CRLF, a byte-order mark, tabs, emoji, a form feed and no final newline; the patch is saved.
local T = dofile(vim.fs.joinpath(vim.fs.dirname(arg[0]), 'driver.lua'))
T.start('shapes.py', { 'config' }, { apply = 'direct' })
T.check(vim.bo.fileformat == 'dos' and vim.bo.bomb and not vim.bo.endofline, 'Neovim knows what the file is')
vim.bo.fixendofline = false
local old = T.lines()

T.go_to('return width + height')
T.command('planpatch.patch', {
  uri = vim.uri_from_bufnr(T.buffer),
  position = { line = vim.api.nvim_win_get_cursor(0)[1] - 1, character = 3 },
  intent = 'return width times height',
})
T.wait('the patch is in the buffer', function()
  return not vim.deep_equal(T.lines(), old)
end)
T.wait('the ledger says applied', function()
  return T.ledger()[1].state == 'applied'
end)
vim.cmd('silent write')
T.finish()
