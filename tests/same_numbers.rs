//! Table, page, CSV and JSON say the same numbers for the same query. (The screens: `src/tui/tests/numbers.rs`.)

mod common;

use common::{Place, document, records};

/// As tables show a rate.
fn rate(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

#[test]
fn every_format_has_the_numbers_of_json() {
    let place = Place::new();
    let query = ["plan", "--model", "qwen2.5-7b", "--gpu", "l40s", "--isl", "8k", "--osl", "256"];
    let with = |more: &[&str]| place.run(&[&query, more].concat()).answered();
    let json = document(&with(&["--json"]), "plan");
    let table = with(&["--html", "page.html"]);
    let page = std::fs::read_to_string(place.path("page.html")).expect("a page");
    let csv = records(&with(&["--csv"]));
    let candidates = json["candidates"].as_array().expect("candidates");
    assert_eq!(csv.len(), candidates.len());
    for (row, c) in csv.iter().zip(candidates) {
        assert_eq!(row["preset"], c["preset"].as_str().expect("a name"));
        let Some(wanted) = c["output_tok_s"].as_f64().filter(|_| !c["answer"].is_null()) else {
            continue;
        };
        let told: f64 = row["output_tok_s"].parse().expect("a number");
        assert!((told / wanted - 1.0).abs() < 1e-12, "{told} {wanted}");
        assert_eq!(row["batch"], c["answer"]["batch"].to_string());
    }
    // The best stands first everywhere.
    let best = &candidates[0];
    let (preset, batch) = (best["preset"].as_str().expect("a name"), &best["answer"]["batch"]);
    let rate = rate(best["output_tok_s"].as_f64().expect("a rate"));
    let line = table.lines().find(|l| l.starts_with(preset)).expect("the best");
    let words: Vec<&str> = line.split_whitespace().collect();
    let batch = batch.to_string();
    assert!(words.contains(&rate.as_str()) && words.contains(&batch.as_str()), "{line}");
    let row = page.split("<tr>").find(|r| r.contains(&format!(">{preset}</td>"))).expect("a row");
    assert!(row.contains(&format!(">{rate}</td>")) && row.contains(&format!(">{batch}</td>")));
}
