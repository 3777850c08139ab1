//! The planner in a real terminal: a session by keys, and where there is none.

mod common;

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::Place;
use portable_pty::{Child, CommandBuilder, MasterPty, PtySize, native_pty_system};

/// A terminal with the planner in it.
struct Session {
    master: Box<dyn MasterPty + Send>,
    child: Box<dyn Child + Send + Sync>,
    writer: Box<dyn Write + Send>,
    output: Receiver<Vec<u8>>,
    screen: vt100::Parser,
    /// Everything that came, as bytes.
    raw: Vec<u8>,
}

impl Session {
    fn open(place: &Place, args: &[&str], rows: u16, cols: u16) -> Self {
        let size = PtySize { rows, cols, pixel_width: 0, pixel_height: 0 };
        let pair = native_pty_system().openpty(size).expect("a terminal");
        let mut command = CommandBuilder::new(env!("CARGO_BIN_EXE_batchmax"));
        command.env_clear();
        command.args(args);
        command.cwd(place.dir.path());
        command.env("HOME", place.dir.path());
        command.env("XDG_DATA_HOME", place.path("data"));
        command.env("TERM", "xterm-256color");
        command.env("LANG", "C.UTF-8");
        let child = pair.slave.spawn_command(command).expect("the program starts");
        drop(pair.slave);
        let mut reader = pair.master.try_clone_reader().expect("readable");
        let writer = pair.master.take_writer().expect("writable");
        let (send, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                if send.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        let screen = vt100::Parser::new(rows, cols, 0);
        Self { master: pair.master, child, writer, output, screen, raw: Vec::new() }
    }

    fn keys(&mut self, keys: &str) {
        self.writer.write_all(keys.as_bytes()).expect("writable");
        self.writer.flush().expect("writable");
    }

    /// Waits until the screen is as wanted; the screen then.
    fn until(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            let text = self.screen.screen().contents();
            if wanted(&text) {
                return text;
            }
            assert!(Instant::now() < end, "{what}:\n{text}");
            if let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(100)) {
                self.screen.process(&bytes);
                self.raw.extend(bytes);
            }
        }
    }

    fn shows(&mut self, text: &str) -> String {
        self.until(text, |screen| screen.contains(text))
    }

    /// Waits for the end; the exit code.
    fn ends(&mut self) -> u32 {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            while let Ok(bytes) = self.output.try_recv() {
                self.screen.process(&bytes);
                self.raw.extend(bytes);
            }
            if let Some(status) = self.child.try_wait().expect("a child") {
                std::thread::sleep(Duration::from_millis(200));
                while let Ok(bytes) = self.output.try_recv() {
                    self.raw.extend(bytes);
                }
                return status.exit_code();
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn left_the_screen(&self) -> bool {
        let text = String::from_utf8_lossy(&self.raw);
        text.contains("\x1b[?1049h") && text.rfind("\x1b[?1049l") > text.rfind("\x1b[?1049h")
    }
}

const DOWN: &str = "\x1b[B";
const RIGHT: &str = "\x1b[C";

#[test]
fn a_session_by_keys() {
    let place = Place::new();
    let args = ["tui", "--gpu", "h100-sxm", "--policy", "full", "snapkv", "batch-max"];
    let mut session = Session::open(&place, &args, 40, 120);
    session.shows("smollm2-135m bf16 on h100-sxm");
    // A model, by parts of its name.
    session.keys("\r");
    session.shows("type parts of a name");
    session.keys("qwen257b");
    session.shows("Enter takes: qwen2.5-7b");
    session.keys("\r");
    session.shows("qwen2.5-7b bf16 on h100-sxm");
    // Three sliders: prompt, output, memory.
    session.keys(&format!("{DOWN}{DOWN}{DOWN}{RIGHT}{RIGHT}{DOWN}{RIGHT}"));
    session.shows("8192 in, 512 out");
    session.keys(&format!("{DOWN}{DOWN}{DOWN}{DOWN}{RIGHT}"));
    session.until("memory", |s| s.contains("◂32MB▸"));
    session.keys("u");
    let screen = session
        .until("undone", |s| s.contains("engine's share") && s.contains("Memory of a device"));
    assert!(screen.contains("kv, prefill peak"), "{screen}");
    // Pin two, compare.
    session.keys("\t ");
    session.shows("pinned as A");
    session.keys(&format!("{DOWN} "));
    session.shows("pinned as B");
    session.keys("3");
    session.shows("Pinned, side by side");
    session.shows("On the front");
    // Smaller, and back.
    let size = PtySize { rows: 12, cols: 50, pixel_width: 0, pixel_height: 0 };
    session.master.resize(size).expect("resized");
    session.screen.screen_mut().set_size(12, 50);
    session.shows("batchmax needs 60 x 15");
    let size = PtySize { rows: 40, cols: 120, pixel_width: 0, pixel_height: 0 };
    session.master.resize(size).expect("resized");
    session.screen.screen_mut().set_size(40, 120);
    session.shows("Pinned, side by side");
    // To a place that can't be written, then to one that can.
    session.keys("e");
    session.shows("export to");
    session.keys("\x15/proc/nowhere/x.json\r");
    session.shows("/proc/nowhere/x.json:");
    session.keys("e\x15front.json\r");
    session.shows("written: front.json");
    let text = std::fs::read_to_string(place.path("front.json")).expect("written");
    let document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(document["model"], "qwen2.5-7b");
    // The command goes to the clipboard of the terminal.
    session.keys("c");
    session.shows("copied: batchmax plan");
    session.keys("q");
    assert_eq!(session.ends(), 0);
    assert!(session.left_the_screen());
    let raw = String::from_utf8_lossy(&session.raw).into_owned();
    assert!(raw.contains("\x1b]52;c;"), "no clipboard");
    let last = raw.rfind("\x1b[?1049l").map(|at| raw[at..].to_owned()).unwrap_or_default();
    assert!(last.contains("batchmax plan --model qwen2.5-7b"), "{last}");
}

#[test]
fn signals_give_the_terminal_back() {
    let place = Place::new();
    let mut session =
        Session::open(&place, &["tui", "--gpu", "h100-sxm", "--policy", "full"], 24, 80);
    session.shows("What is asked");
    let pid = session.child.process_id().expect("a number").to_string();
    let killed = std::process::Command::new("kill").args(["-TERM", &pid]).status().expect("kill");
    assert!(killed.success());
    session.ends();
    assert!(session.left_the_screen());
}

#[test]
fn without_a_terminal_it_says_so() {
    let place = Place::new();
    let ran = place.run(&["tui"]);
    assert_eq!(ran.code, Some(2));
    assert!(
        ran.err.contains("this is not a terminal") && ran.err.contains("hint: "),
        "{}",
        ran.err
    );
    let ran = place.run(&[]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.contains("Usage: batchmax"), "{}", ran.err);
}
