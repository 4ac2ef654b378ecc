-- The user types while the server sends its edit. Neovim compares versions, skips the edit and says that it applied it;
-- but a buffer that was never changed has version 0, which it does not compare: there it applies the edit to the new text.
local T = dofile(vim.fs.joinpath(vim.fs.dirname(arg[0]), 'driver.lua'))
vim.lsp.config('planpatch', { flags = { debounce_text_changes = 1500 } }) -- the server learns of the typing late
T.start('changed.py')

local edit, said
local handler = vim.lsp.handlers['workspace/applyEdit']
vim.lsp.handlers['workspace/applyEdit'] = function(err, params, context)
  edit, said = params.edit.documentChanges[1], handler(err, params, context)
  return said
end

--- Ask for a patch, type a line at the top in the moment of answering "Apply", and answer what the server asks then.
local function apply_while_typing(answer)
  local typed
  T.questions, said = {}, nil
  T.user.answer = function(question)
    if not question:find('has a patch for', 1, true) then
      return answer
    end
    vim.api.nvim_buf_set_lines(T.buffer, 0, 0, true, { '# typed meanwhile' })
    typed = T.lines()
    return 'Apply'
  end
  T.go_to('def clamp')
  T.choose('PlanPatch: add or mend the docstring')
  T.wait('Neovim says that it applied the edit', function()
    return said and said.applied
  end)
  return typed
end

-- A buffer that was changed before.
T.press('x')
T.press('u')
local typed = apply_while_typing('Keep it')
T.check(edit.textDocument.version > 0 and vim.deep_equal(T.lines(), typed), 'it skipped it')
T.wait('the ledger says diverged', function()
  return T.ledger()[1].state == 'diverged'
end)
T.wait('the user is asked', function()
  return #T.questions == 2
end)
T.wait_idle()
T.check(vim.deep_equal(T.lines(), typed), 'the buffer is what the user typed')
T.check(not T.seen(T.menu(), 'PlanPatch: roll back'), 'there is nothing to roll back')
T.say(vim.inspect({ T.questions, T.messages }))

-- A buffer that was not.
vim.cmd('silent write')
vim.cmd.edit('fresh.py')
T.buffer = vim.api.nvim_get_current_buf()
T.wait('the server is attached', function()
  return T.client().attached_buffers[T.buffer]
end)
typed = apply_while_typing('Take it back')
T.check(edit.textDocument.version == 0 and not vim.deep_equal(T.lines(), typed), 'it applied it to the new text')
T.say(vim.inspect(T.lines()))
T.wait('the user is asked, and takes it back', function()
  return vim.deep_equal(T.lines(), typed)
end)
T.wait('the ledger says so', function()
  return not T.ledger()[1].is_applied
end)
T.say(vim.inspect(T.last_ledger[1]))
T.finish()
