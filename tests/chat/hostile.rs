//! Templates that mean harm, or are merely broken: each is a typed error that names the file, and the line where there
//! is one.

use rksc::chat::{ChatTemplate, Message, RenderOptions};
use rksc::{Error, ErrorCode};

use super::template;

fn render(source: &str) -> rksc::Result<String> {
    template(source)?.render(&[Message::user("hello")], &RenderOptions::prompt())
}

#[test]
fn loops_recursion_and_growth_come_to_an_end() {
    let nested = |open: &str, close: &str, n: usize| format!("{{{{ {}1{} }}}}", open.repeat(n), close.repeat(n));
    let grow = |body: &str| {
        format!(
            "{{% set ns = namespace(x='x') %}}\n{{% for a in range(9999) %}}{{% for b in range(9999) %}}{body}{{% endfor %}}{{% endfor %}}"
        )
    };
    let sources = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}".into(),
        "{% for a in range(10 ** 18) %}{% endfor %}".into(),
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}\n{{ f(0) }}".into(),
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(0) }}".into(),
        "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}".into(),
        "{% set s = 'x' * 10 ** 12 %}".into(),
        "{{ 'x' * 99999999 }}".into(),
        "{{ [0] * 10 ** 12 }}".into(),
        "{{ 'ab'.replace('', 'x' * 10000000) }}".into(),
        "{{ ('x' * 1000000).replace('x', 'x' * 1000000) }}".into(),
        "{{ ('x' * 1000000).split('x') | join('y' * 1000000) }}".into(),
        "{{ [messages[0]] * 3000000 }}".into(),
        "{{ ([messages] * 400000) | tojson }}".into(),
        "{{ ([messages] * 400000) | string }}".into(),
        "{{ [0] * 100000000 }}".into(),
        "{{ (['x' * 1000000] * 100000) | join }}".into(),
        "{{ ''.join(['x' * 1000000] * 100000) }}".into(),
        "{{ ('x' * 20000000).split('x') }}".into(),
        "{{ raise_exception(['x' * 1000000] * 1000) }}".into(),
        "{{ [1] | tojson(indent=10 ** 9) }}".into(),
        "{{ [['x' * 1000000] * 1000] * 1000 }}".into(),
        grow("{% set ns.x = ns.x ~ ns.x %}"),
        grow("{% set ns.x = [ns.x, ns.x] %}"),
        grow("{% set ns.x = [ns.x] %}"),
        grow("{{ 'x' * 1000 }}"),
        format!("{}{}", grow("{% set ns.x = [ns.x] %}").replace("range(9999)", "range(150)"), "{{ ns.x }}"),
        format!("{}{}", grow("{% set ns.x = [ns.x] %}").replace("range(9999)", "range(150)"), "{{ ns.x | tojson }}"),
        nested("[", "]", 100_000),
        nested("(", ")", 100_000),
        "{% if 1 %}".repeat(50_000),
    ];
    for source in sources {
        let shown = &source[..source.len().min(90)];
        let error = render(&source).map(|text| text.len()).expect_err(shown);
        assert!(matches!(error, Error::Format { .. }), "{shown}: {error:?}");
        let error = error.to_string();
        assert!(error.contains("t.jinja") && error.len() < 400, "{shown}: {error}");
    }
}

#[test]
fn what_nests_deeply_finds_room_for_all_that_is_done_with_it() {
    // As deep as the fuel lets it, nearly: twenty levels in one expression.
    let level = format!("{{% set ns.x = {}ns.x{} %}}", "[".repeat(20), "]".repeat(20));
    let deep = |n: usize| format!("{{% set ns = namespace(x=0) %}}{{% for a in range({n}) %}}{level}{{% endfor %}}");
    assert_eq!(render(&(deep(10_000) + "done")).unwrap(), "done");
    for what in [
        "{{ ('' ~ ns.x) | length }}",
        "{{ ns.x == ns.x }}",
        "{% set a = [ns.x] %}{{ a in [a, a] }}",
        "{{ [ns.x] | unique | list | length }}",
    ] {
        // Whether it can be paid for is the engine's affair.
        match render(&(deep(7000) + what)) {
            Ok(text) => assert!(text.len() < 20, "{what}: {text}"),
            Err(error) => assert!(matches!(error, Error::Format { .. }), "{what}: {error}"),
        }
    }
    let signs = |sign: &str| render(&format!("{{{{ {}1 }}}}", sign.repeat(100_000)));
    for sign in ["not ", "-"] {
        assert!(signs(sign).is_ok_and(|t| t.len() < 10) || matches!(signs(sign), Err(Error::Format { .. })), "{sign}");
    }
}

#[test]
fn mistakes_are_named_with_file_and_line() {
    for (source, line, what) in [
        ("a\n{% for x in %}", 2, "syntax error"),
        ("a\nb\n{{ messages[0].content.frobnicate() }}", 3, "frobnicate"),
        ("{{ nothing.at.all }}", 1, "undefined value"),
        ("\n{{ x | no_such_filter }}", 2, "no_such_filter"),
        ("\n\n{% generation %}", 3, "unexpected end"),
        ("{% include 'other' %}", 1, "include"),
        ("{{ messages | tojson(frob=1) }}", 1, "frob"),
        ("{{ nothing | tojson }}", 1, "not JSON"),
        ("{{ strftime_now(1) }}", 1, "string"),
    ] {
        let error = render(source).expect_err(source);
        assert_eq!(error.code(), ErrorCode::File, "{source}: {error}");
        let error = error.to_string();
        assert!(error.contains(&format!("t.jinja: chat template: line {line}: ")), "{source}: {error}");
        assert!(error.contains(what), "{source}: {error}");
    }
}

#[test]
fn what_a_template_raises_is_the_callers_affair() {
    let error = render("ok\n{{ raise_exception('no ' ~ messages[0].role) }}").unwrap_err();
    assert_eq!(error.code(), ErrorCode::Caller);
    assert_eq!(error.to_string(), "messages: the chat template (t.jinja, line 2) refuses them: no user");
}

#[test]
fn files_are_found_in_their_order_and_complaints_name_the_field() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let found = |name: Option<&str>| {
        let template = ChatTemplate::from_dir(dir.path(), name)?;
        template.map(|t| t.render(&[Message::user("hi")], &RenderOptions::prompt())).transpose()
    };
    assert_eq!(found(None).unwrap(), None);
    file("chat_template.json", r#"{"chat_template": "processor {{ messages[0].content }}"}"#);
    assert_eq!(found(None).unwrap().unwrap(), "processor hi");
    file(
        "tokenizer_config.json",
        r#"{"chat_template": "config {{ bos_token }}{{ eos_token }}{{ pad_token }}\r\n",
        "bos_token": {"content": "<b>", "lstrip": false}, "eos_token": "<e>", "pad_token": null}"#,
    );
    assert_eq!(found(None).unwrap().unwrap(), "config <b><e>");
    file(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "default", "template": "listed"},
        {"name": "tool_use", "template": "tools\n{{ nope.x }}"}], "eos_token": "<e>"}"#,
    );
    assert_eq!(found(None).unwrap().unwrap(), "listed");
    let error = found(Some("tool_use")).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json: chat template: chat_template \"tool_use\": line 2: "), "{error}");
    file("chat_template.jinja", "jinja {{ eos_token }}");
    assert_eq!(found(None).unwrap().unwrap(), "jinja <e>");
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    file("additional_chat_templates/rag.jinja", "rag");
    assert_eq!(found(Some("rag")).unwrap().unwrap(), "rag");
    let error = found(Some("../chat_template")).unwrap_err().to_string();
    assert!(error.contains("there are: default, rag, tool_use"), "{error}");

    file("mine.jinja", "mine {{ eos_token }}");
    let mine = ChatTemplate::from_file(&dir.path().join("mine.jinja"), Some(dir.path())).unwrap();
    assert_eq!(mine.render(&[], &RenderOptions::default()).unwrap(), "mine <e>");
    for (text, what) in [
        (r#"{"chat_template": 5}"#, "chat_template: must be a string, or a list"),
        (r#"{"chat_template": [{"name": "x"}]}"#, "chat_template: must be a string, or a list"),
        (r#"{"bos_token": {"id": 5}}"#, "bos_token: content"),
        ("{", "not valid JSON"),
    ] {
        file("tokenizer_config.json", text);
        let error = found(None).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: ") && error.contains(what), "{error}");
    }
    let long = dir.path().join("long.jinja");
    std::fs::write(&long, "x".repeat((1 << 20) + 1)).unwrap();
    assert!(ChatTemplate::from_file(&long, None).unwrap_err().to_string().contains("at most 1048576"));
    std::fs::write(&long, [0xff, b'x']).unwrap();
    assert!(ChatTemplate::from_file(&long, None).unwrap_err().to_string().contains("not UTF-8"));
}
