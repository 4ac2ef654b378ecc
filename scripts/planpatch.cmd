@echo off
rem Runs PlanPatch with the Python beside this file in isolated mode: nothing of the current folder, PYTHONPATH or the
rem user's site-packages is imported. pipx and uv tool copy this file out of its environment: their folders come next.
setlocal
set "_pp="
if exist "%~dp0python.exe" set "_pp=%~dp0python.exe"
if not defined _pp if exist "%~dp0..\python.exe" set "_pp=%~dp0..\python.exe"
if not defined _pp if defined UV_TOOL_DIR call :look "%UV_TOOL_DIR%\planpatch"
if not defined _pp if defined APPDATA call :look "%APPDATA%\uv\tools\planpatch"
if not defined _pp if defined PIPX_HOME call :look "%PIPX_HOME%\venvs\planpatch"
if not defined _pp if defined USERPROFILE call :look "%USERPROFILE%\pipx\venvs\planpatch"
if not defined _pp if defined LOCALAPPDATA call :look "%LOCALAPPDATA%\pipx\pipx\venvs\planpatch"
if not defined _pp echo planpatch: there is no python.exe beside "%~f0". Install PlanPatch in an environment of its own. 1>&2
if not defined _pp exit /b 3
"%_pp%" -I -X utf8 -m lsp_server %*
exit /b %ERRORLEVEL%

:look
if exist "%~1\Scripts\python.exe" set "_pp=%~1\Scripts\python.exe"
exit /b 0
