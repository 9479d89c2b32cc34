//! `cargo xtask surface`: each method of the provider traits, and the test that calls it on a reference implementation.
//!
//! The methods are read from `iaas-core/src/spi/`. A call counts when it stands in a function of a file that names the trait,
//! with the method's name and number of arguments, and the file is a test of a reference crate, or a suite that such a test
//! runs. Where that guess is wrong, or a capability excuses the method, a comment in a test says so:
//! `// surface: Trait::method` above the function that calls it, or `// surface: Trait::method excused by CAPABILITY`. The
//! capability is something that the sources of `iaas-core` name; a comment about a method that there is not is a fault.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

use crate::failure::{Context, Failure, Result};
use crate::report::line;
use crate::workspace::root;

/// Prints the list; fails when a method is on it without a test.
pub(crate) fn run() -> Result<()> {
    let root = root();
    let methods = methods_below(&root.join("iaas-core/src/spi"))?;
    let files = test_files(&root)?;
    let known = words_below(&root.join("iaas-core/src"))?;
    let rows: Vec<Row> = methods.iter().map(|method| (method, covered(method, &files))).collect();
    for (method, by) in &rows {
        line(&format!("SURFACE {method}: {}", by.as_deref().unwrap_or("NO TEST")));
    }
    let without = rows.iter().filter(|(_, by)| by.is_none()).count();
    line(&format!("SURFACE {} methods, {without} without a test", rows.len()));
    judge(&rows, &files, &known)
}

/// A method, and who calls it or what excuses it.
type Row<'a> = (&'a Method, Option<String>);

/// Fails for methods without a test, comments about methods that are not there, and excuses that name nothing.
fn judge(rows: &[Row], files: &[TestFile], known: &BTreeSet<String>) -> Result<()> {
    let unlisted: Vec<_> = rows.iter().filter(|(_, by)| by.is_none()).map(|(m, _)| m.to_string()).collect();
    if !unlisted.is_empty() {
        return Err(Failure::new(format!("no test calls {} on a reference", unlisted.join(", "))).remedy(
            "call it in a suite or a reference crate's test, or mark the capability that excuses it",
        ));
    }
    let mut wrong = Vec::new();
    for (file, text) in files.iter().flat_map(|file| markers(&file.text).map(move |text| (file, text))) {
        let Some((method, _)) = rows.iter().find(|(method, _)| note(text, method).is_some()) else {
            wrong.push(format!("{}: `{text}` is about no method", file.shown));
            continue;
        };
        if let Some(Note::Excused(by)) = note(text, method)
            && !by.rsplit("::").next().is_some_and(|last| known.contains(last))
        {
            wrong.push(format!("{}: `{by}`, which is to excuse {method}, is not there", file.shown));
        }
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(wrong.join("; ")).remedy("write what there is, or take the comment away")),
    }
}

/// One method of a provider trait.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Method {
    owner: String,
    name: String,
    /// Arguments after `self`.
    arguments: usize,
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}::{}", self.owner, self.name)
    }
}

/// A file with tests, or with the suites that tests run.
#[derive(Debug)]
struct TestFile {
    shown: String,
    text: String,
    calls: BTreeMap<(String, usize), String>,
    loose_calls: BTreeMap<String, String>,
}

/// Who calls the method, or what excuses it.
fn covered(method: &Method, files: &[TestFile]) -> Option<String> {
    let marked =
        files.iter().find_map(|file| marker(&file.text, method).map(|what| format!("{}{what}", file.shown)));
    marked.or_else(|| {
        let naming = files.iter().filter(|file| names(&file.text, &method.owner));
        naming.filter_map(|file| Some(format!("{}::{}", file.shown, file.caller(method)?))).next()
    })
}

impl TestFile {
    /// Reads the calls of a file; of one that holds the program too, only those in its test modules.
    fn parse(shown: String, text: String) -> Result<Self> {
        let parsed = syn::parse_file(&text).context(&shown)?;
        let mut finder = Calls { counting: is_test(&shown) || shown.starts_with(SUITES), ..Calls::default() };
        finder.visit_file(&parsed);
        Ok(Self { shown, text, calls: finder.calls, loose_calls: finder.loose })
    }

    fn caller(&self, method: &Method) -> Option<&str> {
        let exact = self.calls.get(&(method.name.clone(), method.arguments));
        exact.or_else(|| self.loose_calls.get(&method.name)).map(String::as_str)
    }
}

/// What the comment about the method says: what excuses it, or which function below it calls the method.
fn marker(text: &str, method: &Method) -> Option<String> {
    let mut lines = text.lines();
    loop {
        let note = lines.find_map(|l| note(comment(l)?, method))?;
        match note {
            Note::Excused(by) => return Some(format!(" (excused by {by})")),
            Note::Marked => match lines.clone().find_map(function) {
                Some(name) => return Some(format!("::{name}")),
                None => continue,
            },
        }
    }
}

/// The name of the function that the line begins.
fn function(line: &str) -> Option<&str> {
    let rest =
        line.trim_start().trim_start_matches("pub ").trim_start_matches("async ").strip_prefix("fn ")?;
    rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()
}

/// What a comment says of a method.
#[derive(Debug, PartialEq, Eq)]
enum Note<'a> {
    Marked,
    Excused(&'a str),
}

/// What stands behind `// surface: ` in the text, line by line.
fn markers(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(comment)
}

fn comment(line: &str) -> Option<&str> {
    line.trim().strip_prefix("// surface: ").map(str::trim)
}

/// What the comment says of `method`, if it is about that.
fn note<'a>(comment: &'a str, method: &Method) -> Option<Note<'a>> {
    match comment.strip_prefix(&method.to_string())? {
        "" => Some(Note::Marked),
        rest => rest.strip_prefix(" excused by ").filter(|by| !by.contains(' ')).map(Note::Excused),
    }
}

/// Whether `word` stands in the text by itself.
fn names(text: &str, word: &str) -> bool {
    let inner = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(word).any(|(at, _)| {
        !inner(text[..at].chars().next_back()) && !inner(text[at + word.len()..].chars().next())
    })
}

/// Whether a whole file is a test: it lies in a folder of tests, or is the module `tests` of a program's own file.
fn is_test(shown: &str) -> bool {
    shown.starts_with("tests/") || shown.contains("/tests/") || shown.ends_with("/tests.rs")
}

/// Collects method calls, each with the function that it stands in.
#[derive(Debug, Default)]
struct Calls {
    /// Whether what is visited now belongs to a test.
    counting: bool,
    function: Vec<String>,
    /// Whether what is visited now implements a trait.
    implementing: bool,
    calls: BTreeMap<(String, usize), String>,
    /// Calls inside macros, where the number of arguments is not known.
    loose: BTreeMap<String, String>,
}

impl Calls {
    fn here(&self) -> String {
        self.function.last().cloned().unwrap_or_else(|| "(file)".to_owned())
    }

    /// Finds `. name (` in a macro's tokens.
    fn tokens(&mut self, stream: TokenStream) {
        let mut before: [Option<TokenTree>; 2] = [None, None];
        for token in stream {
            if let TokenTree::Group(group) = &token {
                if let [Some(TokenTree::Punct(dot)), Some(TokenTree::Ident(name))] = &before
                    && dot.as_char() == '.'
                {
                    let here = self.here();
                    if self.counting {
                        self.loose.entry(name.to_string()).or_insert(here);
                    }
                }
                self.tokens(group.stream());
            }
            let [_, last] = before;
            before = [last, Some(token)];
        }
    }
}

impl<'ast> Visit<'ast> for Calls {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let before = self.counting;
        self.counting |= item.attrs.iter().any(is_cfg_test);
        visit::visit_item_mod(self, item);
        self.counting = before;
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let before = std::mem::replace(&mut self.implementing, item.trait_.is_some());
        visit::visit_item_impl(self, item);
        self.implementing = before;
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function.push(item.sig.ident.to_string());
        visit::visit_item_fn(self, item);
        self.function.pop();
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function.push(item.sig.ident.to_string());
        visit::visit_impl_item_fn(self, item);
        self.function.pop();
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        let here = self.here();
        // A trait's method of the same name hands the call on, as a saboteur or a wrapper does.
        if self.counting && !(self.implementing && call.method == here) {
            self.calls.entry((call.method.to_string(), call.args.len())).or_insert(here);
        }
        visit::visit_expr_method_call(self, call);
    }

    fn visit_macro(&mut self, mac: &'ast syn::Macro) {
        self.tokens(mac.tokens.clone());
    }
}

fn is_cfg_test(attribute: &syn::Attribute) -> bool {
    attribute.path().is_ident("cfg") && attribute.parse_args::<syn::Ident>().is_ok_and(|what| what == "test")
}

/// The methods of every public trait, in the order of the files and of the traits in them.
fn methods_below(dir: &Path) -> Result<Vec<Method>> {
    let mut methods = Vec::new();
    for file in rust_files(dir)? {
        let text = fs::read_to_string(&file).at(&file)?;
        methods.extend(methods_of(&text).at(&file)?);
    }
    match methods.is_empty() {
        true => Err(Failure::new(format!("{} holds no public trait", dir.display()))),
        false => Ok(methods),
    }
}

fn methods_of(text: &str) -> syn::Result<Vec<Method>> {
    let mut methods = Vec::new();
    for item in syn::parse_file(text)?.items {
        if let syn::Item::Trait(item) = item
            && matches!(item.vis, syn::Visibility::Public(_))
        {
            let functions =
                item.items.iter().filter_map(|i| if let syn::TraitItem::Fn(f) = i { Some(f) } else { None });
            methods.extend(functions.filter(|f| f.sig.receiver().is_some()).map(|f| Method {
                owner: item.ident.to_string(),
                name: f.sig.ident.to_string(),
                arguments: f.sig.inputs.len() - 1,
            }));
        }
    }
    Ok(methods)
}

/// The reference crates' tests, the tests that cross crates, and those suites that one of them runs.
fn test_files(root: &Path) -> Result<Vec<TestFile>> {
    let mut tests = Vec::new();
    for folder in REFERENCES {
        for file in rust_files(&root.join(folder))? {
            let text = fs::read_to_string(&file).at(&file)?;
            let shown = shown(root, &file);
            if is_test(&shown) || text.contains("#[cfg(test)]") || code(&text).contains("conformance") {
                tests.push((shown, text));
            }
        }
    }
    let suites = rust_files(&root.join(SUITES))?
        .into_iter()
        // The list of modules names every suite and runs none; saboteurs hand calls on.
        .filter(|file| {
            file != &root.join(SUITES).join("mod.rs") && !file.to_string_lossy().contains("sabotage")
        })
        .map(|file| {
            let text = fs::read_to_string(&file).at(&file)?;
            Ok(Suite { name: suite_of(&root.join(SUITES), &file), shown: shown(root, &file), text })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut files = Vec::new();
    for (suite, runner) in run_suites(&suites, &tests) {
        let mut parsed = TestFile::parse(suite.shown.clone(), suite.text.clone())?;
        parsed.shown = format!("{runner} runs {}", parsed.shown);
        files.push(parsed);
    }
    for (shown, text) in tests {
        files.push(TestFile::parse(shown, text)?);
    }
    Ok(files)
}

/// One file of the conformance suites.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Suite {
    name: String,
    shown: String,
    text: String,
}

/// The suites that a reference's test names, and those that these name in turn, each with that test.
fn run_suites<'a>(suites: &'a [Suite], tests: &'a [(String, String)]) -> Vec<(&'a Suite, &'a str)> {
    let named_by_test = |suite: &Suite| {
        tests
            .iter()
            .find(|(_, text)| names(&code(text), &format!("conformance::{}", suite.name)))
            .map(|(shown, _)| shown.as_str())
    };
    let mut run: Vec<(&Suite, &str)> = suites.iter().filter_map(|s| Some((s, named_by_test(s)?))).collect();
    let mut at = 0;
    while let Some((from, runner)) = run.get(at).copied() {
        let next = suites.iter().filter(|s| !run.iter().any(|(known, _)| known == s) && uses(from, s));
        let next: Vec<_> = next.map(|suite| (suite, runner)).collect();
        run.extend(next);
        at += 1;
    }
    run
}

/// `text` without its comments: what a documentation recommends is run by nobody.
fn code(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect()
}

/// Whether a suite's file names another suite, or is of the same.
fn uses(from: &Suite, other: &Suite) -> bool {
    from.name == other.name || names(&from.text, &format!("super::{}", other.name))
}

/// The suite that a file belongs to: the first name below the suites' folder.
fn suite_of(suites: &Path, file: &Path) -> String {
    let below = file.strip_prefix(suites).unwrap_or(file).with_extension("");
    below.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned()).unwrap_or_default()
}

/// Every word of the sources below a folder.
fn words_below(dir: &Path) -> Result<BTreeSet<String>> {
    let mut words = BTreeSet::new();
    for file in rust_files(dir)? {
        let text = fs::read_to_string(&file).at(&file)?;
        words.extend(text.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned));
    }
    Ok(words)
}

fn shown(root: &Path, file: &Path) -> String {
    file.strip_prefix(root).unwrap_or(file).display().to_string()
}

/// Every `.rs` file below a folder, in order. No folder, no files.
fn rust_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).at(&path)?.flatten().map(|e| e.path()));
        } else if path.is_file() && path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

const SUITES: &str = "iaas-core/src/testing/conformance";
const REFERENCES: [&str; 17] = [
    "iaas-vmm/tests",
    "iaas-net/tests",
    "iaas-store/tests",
    "iaas-meter/tests",
    "iaas-core/tests/base.rs",
    "iaas-core/tests/state_store.rs",
    "iaas-core/tests/policy_and_usage.rs",
    "examples/bring_your_own.rs",
    "examples/tests",
    "iaas-core/src/engine/placement.rs",
    "iaas-core/src/spi",
    "iaas-core/src/store",
    "iaas-core/src/security",
    "iaas-vmm/src",
    "iaas-net/src",
    "iaas-store/src",
    "iaas-meter/src",
];

#[cfg(test)]
mod tests {
    use super::*;

    const SPI: &str = "pub trait Pool { fn make(&self, size: u64) -> bool; async fn drop_all(&self); fn new() -> Self; }\n trait Own { fn x(&self); }";

    fn file(text: &str) -> TestFile {
        TestFile::parse("tests/pool.rs".to_owned(), text.to_owned()).unwrap()
    }

    #[test]
    fn a_suite_that_only_a_comment_recommends_is_not_run() {
        let suite = |name: &str| Suite { name: name.to_owned(), shown: name.to_owned(), text: String::new() };
        let suites = [suite("meter"), suite("provider")];
        let text = "/// Prove yours with `testing::conformance::provider`.\nuse conformance::meter;\n";
        let run = run_suites(&suites, &[("tests/a.rs".to_owned(), text.to_owned())]).len();
        assert_eq!(run, 1);
    }

    #[test]
    fn the_surface_is_public_methods_and_no_constructors() {
        let methods: Vec<String> = methods_of(SPI).unwrap().iter().map(Method::to_string).collect();
        assert_eq!(methods, ["Pool::make", "Pool::drop_all"]);
    }

    #[test]
    fn a_call_counts_by_name_by_arguments_and_in_a_file_that_names_the_trait() {
        let make = methods_of(SPI).unwrap().remove(0);
        let by = |text: &str| covered(&make, &[file(text)]);
        assert_eq!(by("use Pool; fn grows() { p.make(1); }").as_deref(), Some("tests/pool.rs::grows"));
        assert_eq!(
            by("use Pool; fn grows() { assert!(p.make(1)); }").as_deref(),
            Some("tests/pool.rs::grows"),
            "in a macro"
        );
        assert_eq!(by("use Pool; fn grows() { p.make(); }"), None, "another make");
        assert_eq!(by("use Pools; fn grows() { p.make(1); }"), None, "another trait");
        assert_eq!(by("use Pool; fn grows() { make(1); }"), None, "a free function");
        assert_eq!(by("use Pool; impl Pool for W { fn make(&self) { self.0.make(1); } }"), None, "handed on");
        assert!(by("use Pool; fn make(p: &dyn Pool) { p.make(1); }").is_some(), "a helper of the same name");
    }

    #[test]
    fn in_a_programs_own_file_only_its_tests_count() {
        let make = methods_of(SPI).unwrap().remove(0);
        let by = |text: &str| {
            covered(&make, &[TestFile::parse("iaas-x/src/pool.rs".to_owned(), text.to_owned()).unwrap()])
        };
        assert_eq!(by("use Pool; fn serve() { p.make(1); }"), None);
        assert!(
            by("use Pool; #[cfg(test)] mod tests { fn grows() { p.make(1); } }")
                .unwrap()
                .ends_with("::grows")
        );
        assert_eq!(by("use Pool; #[cfg(unix)] mod unix { fn serve() { p.make(1); } }"), None);
        assert!(is_test("iaas-x/src/pool/tests.rs") && is_test("iaas-x/tests/support/mod.rs"));
        assert!(!is_test("iaas-x/src/pool.rs") && !is_test("iaas-x/src/contests.rs"));
    }

    #[test]
    fn a_method_that_is_added_without_a_test_fails_and_is_named() {
        let tests = [file("use Pool;\n// surface: Pool::drop_all\nfn grows() { p.make(1); }")];
        let judged = |spi: &str| {
            let methods = methods_of(spi).unwrap();
            let rows: Vec<Row> = methods.iter().map(|m| (m, covered(m, &tests))).collect();
            judge(&rows, &tests, &BTreeSet::new())
        };
        judged(SPI).unwrap();
        let more = SPI.replace("fn new()", "fn shrink(&self); fn new()");
        let failure = judged(&more).unwrap_err().to_string();
        assert!(failure.contains("no test calls Pool::shrink on a reference"), "{failure}");
    }

    #[test]
    fn a_comment_marks_or_excuses_a_method_by_its_whole_name() {
        let make = methods_of(SPI).unwrap().remove(0);
        assert!(
            covered(&make, &[file("// surface: Pool::make excused by Capabilities::grow\n")])
                .unwrap()
                .contains("grow")
        );
        let marked = covered(&make, &[file("// surface: Pool::make\n#[tokio::test]\nasync fn grows() {}")]);
        assert_eq!(marked.as_deref(), Some("tests/pool.rs::grows"));
        assert_eq!(covered(&make, &[file("fn grows() {}\n// surface: Pool::make")]), None, "above nothing");
        assert_eq!(covered(&make, &[file("// surface: Pool::maker\n")]), None);
        assert_eq!(covered(&make, &[file("// surface: Pool::make because\n")]), None);
    }

    #[test]
    fn a_comment_about_nothing_is_a_fault() {
        let methods = methods_of(SPI).unwrap();
        let known = BTreeSet::from(["grow".to_owned()]);
        let judged = |comment: &str| {
            let tests =
                [file(&format!("use Pool;\n// surface: Pool::drop_all\n{comment}\nfn f() {{ p.make(1); }}"))];
            let rows: Vec<Row> = methods.iter().map(|m| (m, covered(m, &tests))).collect();
            judge(&rows, &tests, &known).map_err(|failure| failure.to_string())
        };
        assert_eq!(judged("// surface: Pool::make excused by Capabilities::grow"), Ok(()));
        let gone = judged("// surface: Pool::make excused by Capabilities::fly").unwrap_err();
        assert!(gone.contains("`Capabilities::fly`, which is to excuse Pool::make, is not there"), "{gone}");
        let gone = judged("// surface: Pool::melt").unwrap_err();
        assert!(gone.contains("`Pool::melt` is about no method"), "{gone}");
    }

    #[test]
    fn a_suite_counts_when_a_test_runs_it_or_a_suite_that_uses_it() {
        let suite = |name: &str, text: &str| Suite {
            name: name.into(),
            shown: format!("{name}.rs"),
            text: text.into(),
        };
        let suites = [
            suite("calls", ""),
            suite("pool", "use super::calls;"),
            suite("mod", "mod calls; mod pool; mod other;"),
            suite("other", ""),
        ];
        let run = |text: &str| {
            let tests = [("t.rs".to_owned(), text.to_owned())];
            run_suites(&suites, &tests).iter().map(|(s, _)| s.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(run("use conformance::pool;"), ["pool", "calls"]);
        assert!(run("use elsewhere::pool;").is_empty());
        assert!(run("use conformance::rig; // every pool").is_empty(), "a word alone runs nothing");
    }

    #[test]
    fn a_file_in_a_suites_folder_belongs_to_that_suite() {
        assert_eq!(suite_of(Path::new("/c"), Path::new("/c/store.rs")), "store");
        assert_eq!(suite_of(Path::new("/c"), Path::new("/c/store/leads.rs")), "store");
    }
}
