//! Runs that end badly, as processes of their own.

use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use super::{Desk, QUERY};
use crate::tui::run::{Incoming, take};
use crate::tui::trial::{Going, Process, Trial};

/// What is on the screen when a run that is this script has ended, and what was on it before.
fn after(desk: &mut Desk, script: &str) -> (String, String) {
    let going = Going { command: vec!["validate".to_owned()], ..Going::default() };
    desk.app.trial = Trial::Going(going);
    let (send, receive) = channel();
    let args = ["-c".to_owned(), script.to_owned()];
    let process = Process::start_program(Path::new("sh"), &args, send).expect("a shell");
    let mut before = desk.text(120, 40);
    while matches!(desk.app.trial, Trial::Going(_)) {
        let incoming = receive.recv_timeout(Duration::from_secs(60)).expect("news");
        let effects = take(&mut desk.app, incoming);
        desk.act(effects);
        if matches!(desk.app.trial, Trial::Going(_)) {
            before = desk.text(120, 40);
        }
    }
    drop(process);
    (before, desk.text(120, 40))
}

#[test]
fn a_run_that_fails_midway_is_said_in_place_and_the_planner_goes_on() {
    let mut desk = Desk::new(QUERY);
    desk.press("5");
    let script = "echo 'progress 3 10 snapkv' >&2; printf '{ \"half'; \
        echo 'error: cuda:0: the device is lost' >&2; exit 3";
    let (before, failed) = after(&mut desk, script);
    assert!(before.contains("Running: snapkv") && before.contains("3 of 10 steps"), "{before}");
    assert!(failed.contains("The run failed; the planner goes on"), "{failed}");
    assert!(failed.contains("cuda:0: the device is lost"), "{failed}");
    let (_, killed) = after(&mut desk, "echo 'progress 1 2 full' >&2; kill -9 $$");
    assert!(killed.contains("it was ended by a signal"), "{killed}");
    let (_, silent) = after(&mut desk, "exit 101");
    assert!(silent.contains("it ended with code 101 and said nothing"), "{silent}");
    assert!(silent.contains("the run failed: see Run (5)"), "{silent}");
    // Everything is still there, and keys do what they did.
    desk.press("1<Down>");
    let plan = desk.text(120, 40);
    assert!(plan.contains("Candidates, best first") && plan.contains("snapkv"), "{plan}");
    desk.press("3");
    assert_ne!(desk.text(120, 40), plan);
}

/// One that never says anything is told to stop, and the planner does not wait for it.
#[test]
fn a_run_that_hangs_can_be_left() {
    let (send, receive) = channel();
    let args = ["-c".to_owned(), "exec sleep 600".to_owned()];
    let process = Process::start_program(Path::new("sh"), &args, send).expect("a shell");
    drop(process);
    let ended = receive.recv_timeout(Duration::from_secs(60)).expect("it was stopped");
    assert!(matches!(ended, Incoming::Trial(_)));
}
