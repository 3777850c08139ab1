//! What keys do, whatever they are.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::{Desk, QUERY, picture};
use crate::tui::app::{Effect, Mode, Screen};
use crate::tui::text::LONGEST;
use crate::tui::worker::{Answered, Part};

fn any_key(rng: &mut impl Rng) -> KeyEvent {
    const NAMED: [KeyCode; 15] = [
        KeyCode::Enter,
        KeyCode::Esc,
        KeyCode::Tab,
        KeyCode::BackTab,
        KeyCode::Up,
        KeyCode::Down,
        KeyCode::Left,
        KeyCode::Right,
        KeyCode::Home,
        KeyCode::End,
        KeyCode::PageUp,
        KeyCode::PageDown,
        KeyCode::Backspace,
        KeyCode::Delete,
        KeyCode::F(1),
    ];
    let code = match rng.random_range(0..10) {
        0..5 => NAMED[rng.random_range(0..NAMED.len())],
        5 => KeyCode::Char(char::from_digit(rng.random_range(1..7), 10).expect("a digit")),
        6 => KeyCode::Char(['é', '漢', '🙂', '\u{301}', '/'][rng.random_range(0..5)]),
        _ => KeyCode::Char(char::from(rng.random_range(b' '..=b'~'))),
    };
    let modifiers = match rng.random_range(0..30) {
        0 => KeyModifiers::CONTROL,
        1 => KeyModifiers::ALT,
        _ => KeyModifiers::NONE,
    };
    KeyEvent::new(code, modifiers)
}

#[test]
fn ten_thousand_random_keys_and_sizes() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut desk = Desk::new(QUERY);
    let (mut width, mut height, mut asked) = (80, 24, None);
    for at in 0..10_000 {
        let key = any_key(&mut rng);
        for effect in desk.app.key(key) {
            match effect {
                Effect::Ask(request) => asked = Some(Effect::Ask(request)),
                Effect::Quit | Effect::Copy(_) | Effect::Write { .. } => {}
                Effect::Start(_) | Effect::Stop => {}
            }
        }
        // An answer comes now and then: most are stale by then.
        if at % 40 == 0 {
            desk.act(asked.take().into_iter().collect());
        }
        if rng.random_range(0..20) == 0 {
            (width, height) = (rng.random_range(1..220), rng.random_range(1..70));
        }
        picture(&desk.app, width, height);
    }
}

#[test]
fn letters_in_a_field_are_text() {
    let mut desk = Desk::new(QUERY);
    desk.press("<Down><Down><Down><Enter>q?e1u");
    assert_eq!(desk.app.values.of_flag("isl"), "8kq?e1u");
    assert!(
        desk.app.failed().is_some_and(|why| why.contains("8kq?e1u")),
        "{:?}",
        desk.app.failed()
    );
    // The last answer stays, and the screen lives on.
    assert!(desk.app.found().is_some_and(|(_, new)| !new));
    assert!(desk.text(120, 40).contains("8kq?e1u"));
    desk.press("<Esc>");
    assert_eq!(desk.app.values.of_flag("isl"), "8k");
    assert!(desk.app.found().is_some_and(|(_, new)| new) && desk.app.failed().is_none());
    assert!(desk.done.iter().all(|e| !matches!(e, Effect::Quit)));
}

#[test]
fn a_pasted_novel_is_cut_and_said() {
    let mut desk = Desk::new(QUERY);
    desk.press("<Down><Down><Down><Enter>");
    let effects = desk.app.typed(&"It was a dark night. ".repeat(50_000));
    desk.act(effects);
    let Mode::Typing { line, .. } = &desk.app.mode else { panic!("typing") };
    assert_eq!(line.text().chars().count(), LONGEST);
    assert!(desk.text(80, 24).contains("at most 200 characters"));
    // Where nothing is typed, a paste is no command.
    desk.press("<Esc>");
    assert!(desk.app.typed("qqq").is_empty());
}

#[test]
fn every_parameter_steps_and_comes_back() {
    let mut desk = Desk::new(QUERY);
    let first = desk.app.values.clone();
    desk.press("<Down><Down><Down><Right><Right><Down>+");
    assert_eq!(desk.app.values.of_flag("isl"), "32k");
    assert_eq!(desk.app.values.of_flag("osl"), "288");
    desk.press("uuu");
    assert_eq!(desk.app.values, first);
    desk.press("UUUU");
    assert_eq!(desk.app.values.of_flag("osl"), "288");
    // From every parameter there is a way on.
    for field in 0..crate::tui::form::FIELDS.len() {
        let ways = [true, false].map(|up| desk.app.stepped(field, up));
        assert!(ways.iter().any(Option::is_some), "{}", crate::tui::form::FIELDS[field].flag);
    }
}

#[test]
fn stale_answers_are_dropped() {
    let mut desk = Desk::new(QUERY);
    let old = desk.app.query;
    desk.app.query += 1;
    let why = Part::Failed("too late".to_owned());
    assert!(desk.app.take(Answered { query: old, part: why }).is_empty());
    assert_eq!(desk.app.failed(), None);
    assert!(desk.app.waits());
    desk.app.now = desk.app.answers.found_at + 1.5;
    assert!(desk.text(80, 24).contains("the answer shown is 1.5 s old"));
}

#[test]
fn the_copied_command_asks_the_same() {
    let mut desk = Desk::new(QUERY);
    desk.press("<Tab>c<Enter>c");
    let copied: Vec<&String> = desk
        .done
        .iter()
        .filter_map(|e| if let Effect::Copy(t) = e { Some(t) } else { None })
        .collect();
    let plan = "batchmax plan --model plain-7b --gpu slate-80 --policy full snapkv batch-max kivi --isl 8k";
    assert_eq!(copied[0], plan);
    assert!(
        copied[1].starts_with("batchmax what-if --model plain-7b --isl 8k --policy "),
        "{}",
        copied[1]
    );
    assert!(copied[1].contains(" --gpu slate-80"), "{}", copied[1]);
}

#[test]
fn a_model_file_that_vanishes_is_said_in_place() {
    let mut desk = Desk::new(QUERY);
    let file = desk.dir.path().join("mine.toml");
    std::fs::write(&file, super::MODEL.replace("plain-7b", "mine")).expect("writable");
    desk.press("<Enter>");
    let effects = desk.app.typed(&file.display().to_string());
    desk.act(effects);
    desk.press("<Enter>");
    assert_eq!(desk.app.failed(), None);
    std::fs::remove_file(&file).expect("there");
    desk.press("<Down><Down><Down><Right>");
    assert!(
        desk.app.failed().is_some_and(|why| why.contains("mine.toml")),
        "{:?}",
        desk.app.failed()
    );
    assert!(desk.text(80, 24).contains("mine.toml"));
    desk.press("u");
    desk.press("u");
    assert_eq!(desk.app.failed(), None);
}

#[test]
fn exports_go_where_they_can() {
    let mut desk = Desk::new(QUERY);
    let file = desk.dir.path().join("answer.json");
    desk.press("<Tab>e");
    let Mode::Exporting(line) = &mut desk.app.mode else { panic!("a path is asked") };
    line.clear();
    desk.app.typed(&file.display().to_string());
    desk.press("<Enter>");
    let Some(Effect::Write { path, args }) = desk.done.pop() else { panic!("written") };
    crate::tui::export::write(&desk.places, &args, &path).expect("written");
    let document: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&file).expect("there")).expect("JSON");
    assert_eq!(document["kind"], "plan");
    // A folder that is a file, an ending that nobody knows.
    let inside = format!("{}/x.json", file.display());
    assert!(crate::tui::export::write(&desk.places, &args, &inside).is_err());
    let error = crate::tui::export::write(&desk.places, &args, "x.doc").expect_err("no format");
    assert!(error.to_string().contains("the ending says the format"));
}

#[test]
fn a_cell_of_the_map_becomes_the_query() {
    let mut desk = Desk::new(QUERY);
    desk.press("4<Down><Down><Enter>");
    assert_eq!(desk.app.screen, Screen::Plan);
    assert_eq!(desk.app.values.of_flag("isl"), "8192");
    assert!(desk.app.values.of_flag("memory").ends_with('B'));
    assert_eq!(desk.app.failed(), None);
}
