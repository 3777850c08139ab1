//! Runs of the executor beside the planner: a process of its own, so that a run that fails leaves the planner alone, and its
//! memory is that of a run.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::run::Incoming;

/// Before every line of progress.
pub const PROGRESS: &str = "progress ";

/// How a run stands.
#[derive(Clone, Debug, Default)]
pub enum Trial {
    #[default]
    Idle,
    Going(Going),
    /// What it says, as JSON, and whether its exit code was 0.
    Done {
        command: Vec<String>,
        document: Box<Value>,
        good: bool,
    },
    /// Why it ended: what it said last.
    Failed {
        command: Vec<String>,
        why: Vec<String>,
    },
}

/// A run under way.
#[derive(Clone, Debug, Default)]
pub struct Going {
    pub command: Vec<String>,
    /// What it is at.
    pub label: String,
    pub done: u64,
    pub total: u64,
    /// When it started, seconds.
    pub since: f64,
    /// Whether it was told to stop.
    pub stopping: bool,
}

/// News of a run.
#[derive(Debug)]
pub enum News {
    Progress { label: String, done: u64, total: u64 },
    Ended { out: String, err: Vec<String>, code: Option<i32> },
}

/// What a run that ended left.
pub fn ended(command: Vec<String>, out: &str, err: Vec<String>, code: Option<i32>) -> Trial {
    let document = serde_json::from_str::<Value>(out);
    match (document, code) {
        // Exit code 1 is an answer, too: beyond the tolerance.
        (Ok(document), Some(code @ (0 | 1))) => {
            Trial::Done { command, document: Box::new(document), good: code == 0 }
        }
        _ => {
            let mut why = err;
            if why.is_empty() {
                why.push(match code {
                    Some(code) => format!("it ended with code {code} and said nothing"),
                    None => "it was ended by a signal".to_owned(),
                });
            }
            Trial::Failed { command, why }
        }
    }
}

/// One line of progress: `progress DONE TOTAL LABEL`.
pub fn progress(line: &str) -> Option<News> {
    let mut words = line.strip_prefix(PROGRESS)?.splitn(3, ' ');
    let (done, total) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some(News::Progress { label: words.next().unwrap_or_default().to_owned(), done, total })
}

/// A process that runs.
pub struct Process {
    child: Arc<Mutex<Child>>,
}

impl Process {
    /// Starts the program with some arguments and reports.
    pub fn start(args: &[String], out: Sender<Incoming>) -> std::io::Result<Self> {
        Self::start_program(&std::env::current_exe()?, args, out)
    }

    /// The same of any program.
    pub fn start_program(
        program: &Path,
        args: &[String],
        out: Sender<Incoming>,
    ) -> std::io::Result<Self> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let child = Arc::new(Mutex::new(child));
        let waited = child.clone();
        let answer = std::thread::spawn(move || {
            let mut text = String::new();
            // What is no text is no answer: the exit code says the rest.
            stdout.map(|mut s| s.read_to_string(&mut text).ok());
            text
        });
        std::thread::spawn(move || {
            let mut err = Vec::new();
            let lines = stderr.map(|s| BufReader::new(s).lines());
            for line in lines.into_iter().flatten().map_while(Result::ok) {
                match progress(&line) {
                    Some(news) => drop(out.send(Incoming::Trial(news))),
                    None if err.len() < 20 => err.push(line),
                    None => {}
                }
            }
            let text = answer.join().unwrap_or_default();
            // Both pipes are closed: the process is over or about to be.
            let code = loop {
                let status = waited.lock().map(|mut child| child.try_wait());
                match status {
                    Ok(Ok(None)) => std::thread::sleep(std::time::Duration::from_millis(20)),
                    Ok(Ok(Some(status))) => break status.code(),
                    _ => break None,
                }
            };
            out.send(Incoming::Trial(News::Ended { out: text, err, code })).ok();
        });
        Ok(Self { child })
    }

    /// Asks it to end: files are left whole.
    pub fn stop(&self) {
        let Ok(mut child) = self.child.lock() else { return };
        // Whose end was seen has no number any more.
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        #[cfg(feature = "exec")]
        if let Some(pid) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
            let asked = rustix::process::kill_process(pid, rustix::process::Signal::INT);
            if asked.is_ok() {
                return;
            }
        }
        child.kill().ok();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The reporting thread holds the child itself, not this.
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_progress() {
        let Some(News::Progress { label, done, total }) = progress("progress 3 10 batch-max b")
        else {
            panic!("progress");
        };
        assert_eq!((label.as_str(), done, total), ("batch-max b", 3, 10));
        assert!(progress("error: no").is_none() && progress("progress x 1 y").is_none());
    }

    #[test]
    fn a_run_that_fails_midway_says_why() {
        let said = vec!["error: caches are full".to_owned()];
        let Trial::Failed { why, .. } = ended(Vec::new(), "{ \"half", said.clone(), Some(3)) else {
            panic!("failed");
        };
        assert_eq!(why, said);
        let Trial::Failed { why, .. } = ended(Vec::new(), "", Vec::new(), None) else {
            panic!("failed");
        };
        assert_eq!(why, ["it was ended by a signal"]);
        assert!(matches!(
            ended(Vec::new(), "{}", Vec::new(), Some(1)),
            Trial::Done { good: false, .. }
        ));
    }
}
