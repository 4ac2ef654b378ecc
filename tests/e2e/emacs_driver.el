;;; emacs_driver.el --- Drives Emacs as a user would, for test_emacs.py  -*- lexical-binding: t; -*-

;; emacs -Q --batch -l emacs_driver.el -l CONFIGURATION -l FLOW
;;
;; A flow opens files, goes to places, chooses from menus and waits for what it expects to see.  Minibuffer questions
;; are answered from `drive-answers'; a question that no answer was given for ends the flow.  What a test in Python has
;; to know is printed by `drive-say' as one line of JSON.
;;
;; Batch Emacs differs from one that a user types in: no command loop runs `post-command-hook' (`drive-open' does), and
;; it is never idle, so idle timers, such as eglot's for sending changes, run inside `drive-wait-until'.

(require 'package)
(add-to-list 'package-directory-list "/usr/share/emacs/site-lisp/elpa")
(package-initialize)
(require 'cl-lib)
(require 'ert-x)
(require 'json)
(require 'flymake)

(setq last-nonmenu-event ?x             ; nil means a click, and eglot would pop up a menu of the window system
      make-backup-files nil
      create-lockfiles nil
      auto-save-default nil
      ;; Batch Emacs would end at C-g in a question that the server asked; others show it in the echo area.
      backtrace-on-error-noninteractive nil
      command-error-function (lambda (data context _caller) (message "%s%s" context (error-message-string data)))
      use-dialog-box nil)


(defvar drive-limit (string-to-number (or (getenv "DRIVE_LIMIT_S") "300"))
  "Seconds that anything is waited for.")
(defvar drive-answers nil
  "Answers to minibuffer questions: (QUESTION-REGEXP . CHOICE-REGEXP), or (QUESTION-REGEXP . quit) for C-g.
Each is used once.")
(defvar drive-questions nil "Every question that was asked, with its choices, latest first.")
(defvar drive-messages nil "Every message that was shown, latest first.")
(defvar drive-fault nil "What went wrong while Emacs handled a message of the server.")

;;; Reporting

(defun drive-say (name value)
  "Print NAME and VALUE as one line of JSON."
  (princ (concat (json-encode (list (cons 'name name) (cons 'value value))) "\n")))

(defun drive-fail (format &rest arguments)
  "End the flow: say what is wrong and what was seen."
  (let ((what (apply #'format format arguments)))
    (drive-say "failed"
               (list what
                     (format "questions: %S" (reverse drive-questions))
                     (format "messages: %s" (string-join (reverse drive-messages) "\n"))
                     (format "buffer %s:\n%s" (buffer-name) (buffer-string)))))
  (kill-emacs 1))

;;; Waiting

(defmacro drive-wait-until (what form)
  "Wait until FORM is true, as an idle Emacs would, and return its value; WHAT names it in a failure."
  `(let ((until (+ (float-time) drive-limit)) value)
     (while (not (setq value ,form))
       (when drive-fault (drive-fail "%s" drive-fault))
       (when (> (float-time) until) (drive-fail "it did not come: %s" ,what))
       (drive-idle 0.2))
     value))

(defun drive-idle (seconds)
  "Be idle: take in what processes say for SECONDS and run idle timers."
  (let ((until (+ (float-time) seconds)))
    (while (< (float-time) until) (accept-process-output nil 0.05)))
  (save-current-buffer (ert-run-idle-timers)))

(defun drive-message (regexp)
  "Wait for a message that matches REGEXP, and return its first group or all of it."
  (drive-wait-until
   (format "the message %s" regexp)
   (cl-loop for text in drive-messages
            when (string-match regexp text) return (or (match-string 1 text) text))))

(defun drive-text ()
  "Text of the buffer."
  (save-restriction (widen) (buffer-substring-no-properties (point-min) (point-max))))

(defmacro drive-changing (&rest body)
  "Run BODY and wait until the buffer is not what it was before."
  `(let ((before (drive-text)))
     ,@body
     (drive-wait-until "a change of the buffer" (not (equal (drive-text) before)))))

;;; What a user does

(defun drive-open (file)
  "Visit FILE, as C-x C-f does, and wait until the server manages the buffer."
  (switch-to-buffer (find-file-noselect file))
  (run-hooks 'post-command-hook)
  (drive-wait-until "the language server" (drive-managed-p))
  (drive-idle 0.1))

(defun drive-managed-p ()
  "Whether a language server manages the buffer."
  (if (featurep 'eglot)
      (and (eglot-current-server) (eglot-managed-p))
    (and (bound-and-true-p lsp-mode) (lsp-workspaces)
         (cl-every (lambda (one) (eq (lsp--workspace-status one) 'initialized)) (lsp-workspaces)))))

(defun drive-goto (text)
  "Put point at the beginning of TEXT."
  (goto-char (point-min))
  (unless (search-forward text nil t) (drive-fail "the buffer has no %S" text))
  (goto-char (match-beginning 0)))

(defun drive-menu ()
  "Titles of the code actions at point."
  (if (featurep 'eglot)
      (mapcar (lambda (action) (plist-get action :title)) (eglot-code-actions (point)))
    (mapcar (lambda (action) (lsp-get action :title)) (append (lsp-code-actions-at-point) nil))))

(defun drive-choose (title)
  "Run the code action at point whose title matches TITLE, through the editor's own menu."
  (drive-wait-until (format "%S in the menu" title)
                    (cl-some (lambda (one) (string-match-p title one)) (drive-menu)))
  (push (cons "Pick an action\\|Select code action" title) drive-answers)
  (call-interactively (if (featurep 'eglot) #'eglot-code-actions #'lsp-execute-code-action)))

(defun drive-expect (question choice)
  "The next question that matches QUESTION is to be answered with CHOICE, a regexp or `quit'."
  (setq drive-answers (append drive-answers (list (cons question choice)))))

(defun drive-asked (regexp)
  "Wait until a question that matches REGEXP was asked, and return its choices."
  (cdr (drive-wait-until (format "the question %s" regexp)
                         (cl-find-if (lambda (one) (string-match-p regexp (car one))) drive-questions))))

(defun drive-status ()
  "What the command planpatch.status answers; a server that does not answer at once ends the flow."
  (jsonrpc-request (eglot-current-server) :workspace/executeCommand
                   '(:command "planpatch.status" :arguments []) :timeout 30))

(defun drive-rest ()
  "Wait until no job runs."
  (drive-wait-until "the end of every job" (equal (plist-get (drive-status) :jobs) [])))

(defun drive-end ()
  "Stop the server as a user does, and Emacs with it; a question or a fault that was not expected is a failure."
  (drive-idle 0.1)
  (when drive-fault (drive-fail "%s" drive-fault))
  (when drive-answers (drive-fail "these questions were never asked: %S" drive-answers))
  (drive-say "messages" (vconcat (reverse drive-messages)))
  (if (featurep 'eglot)
      (eglot-shutdown (eglot-current-server))
    (lsp-workspace-shutdown (car (lsp-workspaces))))
  (kill-emacs 0))

;; The commands of a command loop: a boundary before, and no chain of undos.
(defun drive-undo ()
  "Undo the last change, as a first C-/ does."
  (undo-boundary)
  (setq last-command 'ignore)
  (undo)
  (undo-boundary))

(defun drive-notes ()
  "Texts of Flymake's diagnostics in the buffer."
  (flymake-start)
  (mapcar #'flymake-diagnostic-text (flymake-diagnostics)))

(defun drive-note (regexp)
  "Wait for a diagnostic that matches REGEXP, and return its text."
  (drive-wait-until (format "the note %s" regexp)
                    (cl-find-if (lambda (one) (string-match-p regexp one)) (drive-notes))))

;;; The minibuffer

(defun drive-read (question choices)
  "Answer QUESTION, which offers CHOICES, from `drive-answers'."
  (push (cons (substring-no-properties question) choices) drive-questions)
  (let* ((answer (cl-find-if (lambda (one) (string-match-p (car one) question)) drive-answers))
         (chosen (and answer (stringp (cdr answer))
                      (cl-find-if (lambda (one) (string-match-p (cdr answer) one)) choices))))
    (setq drive-answers (remq answer drive-answers))
    (cond (chosen)
          ((eq (cdr answer) 'quit) (signal 'quit nil))
          (t (setq drive-fault (format "no answer to %S among %S" question choices))
             (signal 'quit nil)))))

(defun drive-completing-read (question collection &rest _)
  "Stands in for `completing-read'."
  (drive-read question (mapcar (lambda (one) (if (consp one) (car one) one)) (all-completions "" collection))))

(advice-add 'completing-read :override #'drive-completing-read)
(advice-add 'y-or-n-p :override (lambda (question) (equal (drive-read question '("yes" "no")) "yes")))
(advice-add 'yes-or-no-p :override (lambda (question) (equal (drive-read question '("yes" "no")) "yes")))
(advice-add 'message :before
            (lambda (format &rest arguments)
              (when format (push (apply #'format-message format arguments) drive-messages))))

;;; emacs_driver.el ends here
