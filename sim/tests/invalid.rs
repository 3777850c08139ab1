//! One mistake a file: `invalid/KIND-MISTAKE.toml` says in its first line what the error must say after the file's name.

use std::path::Path;

use batchmax_sim::policy::Preset;
use batchmax_sim::profile::Catalog;

#[test]
fn every_mistake_is_named_with_its_place() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/invalid");
    let catalog = Catalog::built_in();
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .expect("the folder is here")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let mut wrong = Vec::new();
    for file in &files {
        let text = std::fs::read_to_string(file).expect("readable");
        let expected = text
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("# expected: "))
            .expect("the first line says what is expected");
        let path = file.to_str().expect("UTF-8");
        let name = file.file_stem().expect("a name").to_string_lossy();
        let error = match name.split('-').next() {
            Some("model") => catalog.model(path).err(),
            Some("gpu") => catalog.gpu(path).err(),
            Some("policy") => Preset::parse(&catalog, path).err(),
            _ => panic!("{name}: begins with model-, gpu- or policy-"),
        };
        let said = error.map_or_else(|| "nothing".to_owned(), |e| e.to_string());
        let said = said.strip_prefix(path).unwrap_or(&said);
        if said != expected {
            wrong.push(format!("{name}\n  expected {expected}\n  said     {said}"));
        }
    }
    assert!(files.len() >= 30, "{} files", files.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
