//! Man pages and completions, as packages generate them.

use std::collections::BTreeSet;

use logs_tests::{Tool, binary};

const TOOLS: [&str; 2] = ["emit-log", "receive-logs"];

fn output(tool: &str, args: &[&str]) -> String {
    Tool::new(binary(tool)).args(args).run().success().stdout_text()
}

/// The lines of a section of the man page, without escapes of roff.
fn section(tool: &str, title: &str) -> Vec<String> {
    let page = output(tool, &["--generate", "man"]).replace("\\-", "-").replace("\\*(Aq", "'");
    let lines =
        page.lines().skip_while(|line| line.replace('"', "") != format!(".SH {title}")).skip(1);
    let lines: Vec<_> =
        lines.take_while(|line| !line.starts_with(".SH")).map(String::from).collect();
    assert!(!lines.is_empty(), "{tool}: no section {title} in {page}");
    lines
}

/// The terms that a section of the man page explains.
fn terms(tool: &str, title: &str) -> Vec<String> {
    let bold = |line: String| Some(line.strip_prefix("\\fB")?.strip_suffix("\\fR")?.to_string());
    section(tool, title).into_iter().filter_map(bold).collect()
}

/// The long options of a text.
fn options(text: &str) -> BTreeSet<&str> {
    let is_name = |character: char| character.is_ascii_lowercase() || character == '-';
    let words = text.split(|character: char| !is_name(character));
    words.filter(|word| word.starts_with("--") && word.len() > 2).collect()
}

#[test]
fn man_page_and_completions_know_every_option() {
    for tool in TOOLS {
        // Descriptions may name options of the other tool, so only the lines of options are checked.
        let help = output(tool, &["--help"]);
        let is_option = |line: &&str| line.trim_start().starts_with('-');
        let help = help.lines().filter(is_option).collect::<Vec<_>>().join("\n");
        for what in ["man", "bash", "zsh", "fish"] {
            let text = output(tool, &["--generate", what]).replace("\\-", "-");
            // fish: `-l format`
            let text = text.replace(" -l ", " --");
            let missing: Vec<_> = options(&help).difference(&options(&text)).copied().collect();
            assert!(missing.is_empty(), "{tool} --generate {what}: {missing:?}");
            assert!(!text.contains("--generate"), "{tool} --generate {what}");
        }
    }
}

#[test]
fn man_pages_explain_the_statuses_of_the_help() {
    for tool in TOOLS {
        let help = output(tool, &["-h"]);
        let (_, statuses) = help.split_once("Exit status: ").unwrap();
        let in_help = statuses.split(';').filter_map(|part| part.split_whitespace().next());
        let in_help: BTreeSet<_> = in_help.map(String::from).collect();
        let in_man: BTreeSet<_> = terms(tool, "EXIT STATUS").into_iter().collect();
        assert!(in_help.len() > 5, "{in_help:?}");
        assert_eq!(in_man, in_help, "{tool}");
    }
}

#[test]
fn man_pages_have_the_usual_sections() {
    for tool in TOOLS {
        for title in ["ENVIRONMENT", "FILES", "SIGNALS", "EXAMPLES", "SEE ALSO"] {
            section(tool, title);
        }
    }
}

/// With `--help` as the last argument, the tools only check the arguments before it.
#[test]
fn the_examples_of_man_pages_are_right() {
    const SCRIPT: &str = r#"
        check() { "$@" --help >/dev/null 2>>errors || echo "$*" >>errors; }
        emit-log() { check "$EMIT_LOG" "$@"; }
        receive-logs() { check "$RECEIVE_LOGS" "$@"; }
        app() { :; }; mail() { :; }; jq() { :; }
        : >errors; : >big.log
        eval "$1"
        cat errors"#;
    for tool in TOOLS {
        for example in terms(tool, "EXAMPLES") {
            let directory = tempfile::tempdir().unwrap();
            let script = format!("cd \"$2\"; {SCRIPT}");
            let shell =
                Tool::new("bash").args(["-c", &script, "bash", &example]).arg(directory.path());
            let shell = shell.env("EMIT_LOG", binary("emit-log"));
            let ended = shell.env("RECEIVE_LOGS", binary("receive-logs")).run().success();
            assert_eq!(ended.stdout_text(), "", "{example}");
        }
    }
}

#[test]
fn bash_completes_the_values_of_an_option() {
    for (tool, option, values) in [
        ("emit-log", "--when-full", "block drop-oldest drop-newest\n"),
        ("receive-logs", "--format", "text raw json\n"),
    ] {
        let script = format!(
            "eval \"$(\"$1\" --generate bash)\"; COMP_WORDS=({tool} {option} ''); COMP_CWORD=2\n\
             _{} {tool} '' {option}; echo \"${{COMPREPLY[*]}}\"",
            tool.replace('-', "__")
        );
        let shell = Tool::new("bash").args(["-c", &script, "bash"]).arg(binary(tool));
        assert_eq!(shell.run().success().stdout_text(), values);
    }
}

#[test]
fn generate_rejects_other_values() {
    for args in [&["--generate"][..], &["--generate", "x"], &["--generate", "man", "x"]] {
        for tool in TOOLS {
            Tool::new(binary(tool)).args(args).run().exits_with(2);
        }
    }
}
