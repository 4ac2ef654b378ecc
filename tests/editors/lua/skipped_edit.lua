-- The user types while the server's edit is on its way. Neovim compares versions, skips the edit and says that it applied
-- it. A buffer that was never changed has version 0, which it does not compare: there the edit goes into the new text.
local T = dofile(vim.fs.joinpath(vim.fs.dirname(arg[0]), 'driver.lua'))
T.start('changed.py')

local edit, said, typed
local handler = vim.lsp.handlers['workspace/applyEdit']
vim.lsp.handlers['workspace/applyEdit'] = function(err, params, context)
  if typed == nil then
    vim.api.nvim_buf_set_lines(T.buffer, 0, 0, true, { '# typed meanwhile' })
    typed = T.lines()
  end
  edit, said = params.edit.documentChanges[1], handler(err, params, context)
  return said
end

local function apply_while_typing(then_answer)
  T.questions, said, typed = {}, nil, nil
  T.user.answer = function(question)
    return question:find('has a patch for', 1, true) and 'Apply' or then_answer
  end
  T.go_to('def clamp')
  T.choose('PlanPatch: add or mend the docstring')
  T.wait('Neovim says that it applied the edit', function()
    return said and said.applied
  end)
end

-- A buffer that was changed before.
T.press('x')
T.press('u')
apply_while_typing()
T.check(edit.textDocument.version > 0 and vim.deep_equal(T.lines(), typed), 'it skipped it')
T.wait('the ledger says diverged', function()
  return T.ledger()[1].state == 'diverged'
end)
T.wait('the user is told', function()
  return T.seen(T.messages, 'said that it applied the patch, but the patch is not found')
end)
T.wait_idle()
T.check(#T.questions == 1, 'nothing more is asked')
T.check(vim.deep_equal(T.lines(), typed), 'the buffer is what the user typed')
T.check(not T.seen(T.menu(), 'PlanPatch: roll back'), 'there is nothing to roll back')

-- A buffer that was not.
vim.cmd('silent write')
vim.cmd.edit('fresh.py')
T.buffer = vim.api.nvim_get_current_buf()
T.wait('the server is attached', function()
  return T.client().attached_buffers[T.buffer]
end)
apply_while_typing('Take it back')
T.check(edit.textDocument.version == 0 and not vim.deep_equal(T.lines(), typed), 'it applied it to the new text')
T.wait('the user is asked, and takes it back', function()
  return vim.deep_equal(T.lines(), typed)
end)
T.wait('the ledger says so', function()
  return not T.ledger()[1].is_applied
end)
T.finish()
