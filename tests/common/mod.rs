//! The program as a process, in a place where nothing of this machine is.
#![allow(dead_code, reason = "each test file uses its part")]

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// A model that runs in no time.
pub const TINY: &str = r#"
name = "tiny"
source = "made up"
layers = 2
hidden = 64
heads = 4
kv_heads = 2
head_dim = 16
ffn = 128
vocab = 100
context = 512
rope_theta = 10000.0
weight_dtype = "f32"
"#;

/// A place where nothing of this machine is: no models, no profile, no variables.
pub struct Place {
    pub dir: TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    /// With a small model in `tiny.toml`.
    pub fn with_tiny() -> Self {
        let place = Self::new();
        place.write("tiny.toml", TINY);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("inside")).expect("writable");
        std::fs::write(&path, text).expect("writable");
        path
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        let output = Command::new(env!("CARGO_BIN_EXE_batchmax"))
            .args(args)
            .current_dir(self.dir.path())
            .env_clear()
            .env("HOME", self.dir.path())
            .env("XDG_DATA_HOME", self.path("data"))
            .output()
            .expect("the program starts");
        Ran::new(args, &output)
    }
}

/// What came of a command.
pub struct Ran {
    pub command: String,
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn new(args: &[&str], output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
        let ran = Self {
            command: args.join(" "),
            code: output.status.code(),
            out: text(&output.stdout),
            err: text(&output.stderr),
        };
        assert!(!ran.err.contains("panicked"), "{}: {}", ran.command, ran.err);
        ran
    }

    /// It answered, and said nothing else.
    #[track_caller]
    pub fn answered(self) -> String {
        assert_eq!(self.code, Some(0), "{}: {}", self.command, self.err);
        assert_eq!(self.err, "", "{}", self.command);
        self.out
    }

    /// The answer is no: that is an answer too, on stdout.
    #[track_caller]
    pub fn no(self) -> String {
        assert_eq!(self.code, Some(1), "{}: {}", self.command, self.err);
        assert_eq!(self.err, "", "{}", self.command);
        self.out
    }

    /// Bad input: one line that says what is wrong, at most one more that says what to do.
    #[track_caller]
    pub fn refused(self) -> String {
        assert_eq!(self.code, Some(2), "{}: {}", self.command, self.out);
        assert_eq!(self.out, "", "{}", self.command);
        let lines: Vec<_> = self.err.lines().collect();
        assert!(lines[0].starts_with("error: "), "{}: {}", self.command, self.err);
        assert!(
            lines.len() == 1 || lines.len() == 2 && lines[1].starts_with("hint: "),
            "{}: {}",
            self.command,
            self.err
        );
        self.err
    }
}

#[track_caller]
pub fn run(args: &str) -> Ran {
    Place::new().run(&args.split_whitespace().collect::<Vec<_>>())
}

#[track_caller]
pub fn refuses(args: &str, parts: &[&str]) {
    let err = run(args).refused();
    for part in parts {
        assert!(err.contains(part), "{args}: {err}");
    }
}

#[track_caller]
pub fn document(text: &str, kind: &str) -> Value {
    let value: Value = serde_json::from_str(text).expect("valid JSON");
    assert_eq!(value["schema_version"], 1);
    assert_eq!(value["kind"], kind);
    value
}

pub fn records(text: &str) -> Vec<std::collections::HashMap<String, String>> {
    csv::Reader::from_reader(text.as_bytes())
        .deserialize()
        .collect::<Result<_, _>>()
        .expect("records of one length")
}

/// Numbers become `0`, signs of sources `.` and runs of blanks one: what is left does not depend on the cost model.
pub fn shape_of(text: &str) -> String {
    let number = |word: &str| {
        let plain =
            word.trim_start_matches(['±', '+', '-', '(']).trim_end_matches([')', ',', ':', 'x']);
        plain.replace(['.', ','], "").parse::<u64>().is_ok()
    };
    let mut out = String::new();
    for line in text.lines() {
        let words: Vec<&str> = line
            .split_whitespace()
            .map(|word| match word {
                "●" | "◐" | "◔" | "○" => ".",
                _ if number(word) => "0",
                _ => word,
            })
            .collect();
        out += words.join(" ").as_str();
        out.push('\n');
    }
    out
}

pub const LLAMA_ON_H100: &str = "--model llama-3.1-8b --gpu h100-sxm";
