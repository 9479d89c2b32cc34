//! The contract of [`StateStore`], clause by clause.

mod sabotage;

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::Report;
use super::Verdict;
use super::checks;
use super::demand;
use super::should;
use super::should_fail;
use crate::Epoch;
use crate::ErrorKind;
use crate::Result;
use crate::Rev;
use crate::spi::Pull;
use crate::spi::state_store::Change;
use crate::spi::state_store::Check;
use crate::spi::state_store::Entry;
use crate::spi::state_store::Lead;
use crate::spi::state_store::MAX_BYTES;
use crate::spi::state_store::MAX_CHECKS;
use crate::spi::state_store::MAX_WRITES;
use crate::spi::state_store::StateStore;
use crate::spi::state_store::Write;
use crate::store::MemoryStore;

pub use sabotage::saboteurs;

/// What the suite needs to know about your store.
#[async_trait]
pub trait Rig: Send + Sync + 'static {
    /// A new, empty store on a backing of its own.
    async fn fresh(&self) -> Result<Arc<dyn StateStore>>;

    /// As after a restart of the process: `old`, the last handle of the newest fresh store, goes, and the store is
    /// opened again on what it left.
    async fn reopen(&self, old: Arc<dyn StateStore>) -> Result<Arc<dyn StateStore>>;
}

/// The checks, in the order of the contract.
pub fn suite() -> &'static [super::Check<dyn Rig>] {
    checks![dyn Rig:
        "commit-atomic" => commit_atomic,
        "commit-durable" => commit_durable,
        "rev-grows" => rev_grows,
        "check-absent" => check_absent,
        "check-at" => check_at,
        "limits" => limits,
        "no-key-twice" => no_key_twice,
        "scan-ordered" => scan_ordered,
        "scan-rev" => scan_rev,
        "epoch-grows" => epoch_grows,
        "stale-lead-fenced" => stale_lead_fenced,
        "one-lead" => one_lead,
        "resign-frees" => resign_frees,
        "watch-complete" => watch_complete,
        "watch-prefix" => watch_prefix,
        "get-latest" => get_latest,
    ]
}

/// Runs the suite.
pub async fn run(rig: &impl Rig) -> Report {
    super::run::<dyn Rig>("state store", suite(), rig).await
}

/// The rig of [`MemoryStore`].
#[derive(Debug, Default)]
pub struct MemoryRig {
    current: Mutex<Option<Arc<MemoryStore>>>,
}

#[async_trait]
impl Rig for MemoryRig {
    async fn fresh(&self) -> Result<Arc<dyn StateStore>> {
        let store = Arc::new(MemoryStore::new());
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(store.clone());
        Ok(store)
    }

    async fn reopen(&self, old: Arc<dyn StateStore>) -> Result<Arc<dyn StateStore>> {
        drop(old);
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let store = Arc::new(current.as_ref().map_or_else(MemoryStore::new, |store| store.reopen()));
        *current = Some(store.clone());
        Ok(store)
    }
}

// ---- the checks -------------------------------------------------------------------------------------------------

async fn commit_atomic(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    let first = commit(&*store, &lead, vec![], vec![put("old", "1")]).await?;
    // Two reasons to refuse, so that this check does not depend on either kind alone.
    let refused = vec![Check::Absent(key("old")), Check::At(key("old"), Rev(first.0 + 1))];
    let writes = vec![put("a", "1"), put("b", "1"), Write::Delete(key("old"))];
    should_fail("a refused commit", ErrorKind::Conflict, store.commit(&lead, refused, writes.clone()).await)?;
    let left = all(&*store, "").await?;
    demand!(left.len() == 1 && left[0].key == "old", "a refused commit left {left:?}");
    commit(&*store, &lead, vec![], writes).await?;
    let left = keys(&all(&*store, "").await?);
    demand!(left == ["a", "b"], "after the commit there is {left:?} instead of a and b");
    Ok(())
}

async fn commit_durable(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    for n in 0..20 {
        commit(&*store, &lead, vec![], vec![put(&format!("k{n:02}"), "v"), put("last", &n.to_string())])
            .await?;
    }
    commit(&*store, &lead, vec![], vec![Write::Delete(key("k00")), put("end", "v")]).await?;
    let before = all(&*store, "").await?;
    let store = reopen(rig, store).await?;
    let after = all(&*store, "").await?;
    demand!(before == after, "before the restart {:?}, after it {:?}", keys(&before), keys(&after));
    Ok(())
}

async fn rev_grows(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let first = lead(&*store, ANNA).await?;
    let mut revs = Vec::new();
    for writes in [vec![put("a", "1")], vec![], vec![Write::Delete(key("a"))], vec![Write::Delete(key("a"))]]
    {
        revs.push(commit(&*store, &first, vec![], writes).await?);
    }
    should("resign", store.resign(first).await)?;
    let store = reopen(rig, store).await?;
    let second = lead(&*store, ANNA).await?;
    revs.push(commit(&*store, &second, vec![], vec![put("a", "2")]).await?);
    demand!(revs.windows(2).all(|pair| pair[0] < pair[1]), "the revisions were {revs:?}");
    Ok(())
}

async fn check_absent(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    let absent = |k: &str| vec![Check::Absent(key(k))];
    commit(&*store, &lead, absent("a"), vec![put("a", "1")]).await?;
    let again = store.commit(&lead, absent("a"), vec![put("b", "1")]).await;
    should_fail("`Absent` of a key that is there", ErrorKind::Conflict, again)?;
    commit(&*store, &lead, vec![], vec![Write::Delete(key("a"))]).await?;
    commit(&*store, &lead, absent("a"), vec![put("a", "2")]).await?;
    Ok(())
}

async fn check_at(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    let at = |rev| vec![Check::At(key("a"), rev)];
    let first = commit(&*store, &lead, vec![], vec![put("a", "1")]).await?;
    commit(&*store, &lead, vec![], vec![put("b", "1")]).await?;
    // A commit that did not write `a` leaves its revision alone.
    let second = commit(&*store, &lead, at(first), vec![put("a", "2")]).await?;
    let stale = store.commit(&lead, at(first), vec![put("c", "1")]).await;
    should_fail("`At` of an older revision", ErrorKind::Conflict, stale)?;
    commit(&*store, &lead, at(second), vec![Write::Delete(key("a"))]).await?;
    let gone = store.commit(&lead, at(second), vec![put("c", "1")]).await;
    should_fail("`At` of a key that is gone", ErrorKind::Conflict, gone)
}

async fn limits(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    let checks = |n: usize| (0..n).map(|n| Check::Absent(key(&format!("no{n}")))).collect::<Vec<_>>();
    let writes = |n: usize| (0..n).map(|n| put(&format!("w{n:03}"), "v")).collect::<Vec<_>>();
    let bytes = |n: usize| vec![Write::Put(key("big"), Bytes::from(vec![b'x'; n - 3]))];
    for (what, checks, writes) in [
        ("a check too many", checks(MAX_CHECKS + 1), writes(1)),
        ("a write too many", vec![], writes(MAX_WRITES + 1)),
        ("a byte too many", vec![], bytes(MAX_BYTES + 1)),
    ] {
        should_fail(what, ErrorKind::Invalid, store.commit(&lead, checks, writes).await)?;
        demand!(all(&*store, "").await?.is_empty(), "{what}: something was written");
    }
    commit(&*store, &lead, checks(MAX_CHECKS), writes(MAX_WRITES)).await?;
    commit(&*store, &lead, vec![], bytes(MAX_BYTES)).await?;
    let found = all(&*store, "").await?.len();
    demand!(found == MAX_WRITES + 1, "commits at the limits left {found} entries");
    Ok(())
}

async fn no_key_twice(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    for second in [put("a", "2"), Write::Delete(key("a"))] {
        let twice = store.commit(&lead, vec![], vec![put("a", "1"), put("b", "1"), second]).await;
        should_fail("a key twice", ErrorKind::Invalid, twice)?;
    }
    demand!(all(&*store, "").await?.is_empty(), "something was written");
    Ok(())
}

async fn scan_ordered(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    let inside: [&[u8]; 6] = [b"p/", b"p/\0", b"p/a", b"p/a\xff", b"p/b", b"p/\xff\xff"];
    let outside: [&[u8]; 4] = [b"", b"p", b"p.", b"p0"];
    let mut shuffled: Vec<&[u8]> = [&outside[..], &inside[..]].concat();
    shuffled.rotate_left(5);
    shuffled.swap(0, 7);
    let writes =
        shuffled.iter().map(|k| Write::Put(Bytes::copy_from_slice(k), Bytes::from_static(b"v"))).collect();
    commit(&*store, &lead, vec![], writes).await?;

    let ask = async |after: Option<&[u8]>, limit| {
        let (found, _) = should("scan", store.scan(b"p/", after, limit).await)?;
        Ok::<_, String>(found.into_iter().map(|entry| entry.key).collect::<Vec<_>>())
    };
    let whole = ask(None, 100).await?;
    demand!(whole == inside, "the scan gave {whole:?} instead of {inside:?}");
    for limit in 0..=inside.len() {
        let page = ask(None, limit).await?;
        demand!(page == inside[..limit], "a scan of at most {limit} gave {page:?}");
    }
    for (place, after) in inside.iter().enumerate() {
        let rest = ask(Some(after), 100).await?;
        demand!(rest == inside[place + 1..], "the scan after {after:?} gave {rest:?}");
    }
    let before = ask(Some(b"a"), 100).await?;
    demand!(before == inside, "a scan after a key below the prefix gave {before:?}");
    let beyond = ask(Some(b"q"), 100).await?;
    demand!(beyond.is_empty(), "a scan after a key beyond the prefix gave {beyond:?}");
    Ok(())
}

async fn scan_rev(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    let rev = commit(&*store, &lead, vec![], vec![put("a", "0"), put("b", "0")]).await?;
    let (_, seen) = should("scan", store.scan(b"", None, 1).await)?;
    demand!(seen == rev, "a scan after commit {rev} says {seen}");
    let writer = {
        let store = store.clone();
        tokio::spawn(async move {
            for n in 1..50 {
                let value = n.to_string();
                commit(&*store, &lead, vec![], vec![put("a", &value), put("b", &value)]).await?;
            }
            Ok::<_, String>(())
        })
    };
    // Every commit writes both keys, so whatever moment a scan reads, both have its revision.
    let mut scans = 0;
    while !writer.is_finished() || scans == 0 {
        let (found, seen) = should("scan", store.scan(b"", None, 10).await)?;
        let revs: Vec<_> = found.iter().map(|entry| entry.rev).collect();
        demand!(revs == [seen, seen], "a scan at {seen} shows entries of {revs:?}");
        scans += 1;
        // On a runtime of one thread the writer has its turn only here.
        tokio::task::yield_now().await;
    }
    writer.await.map_err(|e| e.to_string())?
}

async fn epoch_grows(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let first =
        should("lead", store.lead(ANNA, TTL, Epoch(41)).await)?.ok_or("a fresh store has a leader")?;
    demand!(first.epoch > Epoch(41), "above the floor of 41 came {}", first.epoch);
    should("resign", store.resign(first.clone()).await)?;
    let second = lead(&*store, BERT).await?;
    demand!(second.epoch > first.epoch, "after {} came {}", first.epoch, second.epoch);
    should("resign", store.resign(second.clone()).await)?;
    let store = reopen(rig, store).await?;
    let third = lead(&*store, ANNA).await?;
    demand!(third.epoch > second.epoch, "after {} and a restart came {}", second.epoch, third.epoch);
    Ok(())
}

async fn stale_lead_fenced(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let anna = lead(&*store, ANNA).await?;
    commit(&*store, &anna, vec![], vec![put("a", "anna")]).await?;
    should("resign", store.resign(anna.clone()).await)?;
    let bert = lead(&*store, BERT).await?;
    let before = all(&*store, "").await?;
    let late = store.commit(&anna, vec![], vec![put("a", "late"), put("b", "late")]).await;
    should_fail("a commit by the older lead", ErrorKind::Fenced, late)?;
    should_fail("a renewal of the older lead", ErrorKind::Fenced, store.renew(&anna).await)?;
    let forged = Lead { me: BERT, ..anna };
    should_fail(
        "a commit with the older epoch",
        ErrorKind::Fenced,
        store.commit(&forged, vec![], vec![]).await,
    )?;
    let after = all(&*store, "").await?;
    demand!(before == after, "the older lead changed {before:?} to {after:?}");
    commit(&*store, &bert, vec![], vec![put("a", "bert")]).await?;
    should("renew the newest lead", store.renew(&bert).await)
}

async fn one_lead(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let mut tasks = JoinSet::new();
    for n in 1..=8 {
        let store = store.clone();
        tasks.spawn(async move { store.lead(Uuid::from_u128(n), TTL, Epoch(0)).await });
    }
    let mut granted = Vec::new();
    while let Some(done) = tasks.join_next().await {
        granted.extend(should("lead", done.map_err(|e| e.to_string())?)?);
    }
    let [lead] = &granted[..] else { return Err(format!("eight askers got {granted:?}")) };
    let other = should("lead", store.lead(OTHER, TTL, Epoch(0)).await)?;
    demand!(other.is_none(), "while {lead:?} lasts another got {other:?}");
    commit(&*store, lead, vec![], vec![put("a", "1")]).await?;
    Ok(())
}

async fn resign_frees(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let anna = lead(&*store, ANNA).await?;
    should("resign", store.resign(anna).await)?;
    let bert = should("lead", store.lead(BERT, TTL, Epoch(0)).await)?;
    demand!(bert.is_some(), "after Anna resigned Bert did not get the lead");
    Ok(())
}

async fn watch_complete(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    let start = commit(&*store, &lead, vec![], vec![put("a", "0"), put("b", "0")]).await?;
    let mut early = should("watch", store.watch(b"", start).await)?;
    let mut expected = Vec::new();
    for n in 1..=5 {
        let writes = vec![put("a", &n.to_string()), put(&format!("n{n}"), "v")];
        let rev = commit(&*store, &lead, vec![], writes.clone()).await?;
        expected.extend(changes(writes, rev));
    }
    let rev =
        commit(&*store, &lead, vec![], vec![Write::Delete(key("b")), Write::Delete(key("none"))]).await?;
    // What was not there was not changed, so the last commit has one change.
    expected.push(Change::Deleted { key: key("b"), rev });
    let sorted = |mut changes: Vec<Change>| {
        // Within a commit the order is the store's own.
        changes.sort_by_key(|c| (of(c).0, of(c).1.clone()));
        changes
    };
    let seen = take_until(&mut *early, rev).await?;
    demand!(seen.iter().map(|c| of(c).0).is_sorted(), "the watch gave {seen:?}");
    demand!(
        sorted(seen.clone()) == sorted(expected.clone()),
        "the watch gave {seen:?} instead of {expected:?}"
    );

    let mut late = should("watch", store.watch(b"", start).await)?;
    let seen = take_until(&mut *late, rev).await?;
    demand!(sorted(seen.clone()) == sorted(expected), "a watch of the past gave {seen:?}");

    let (next, rev) = {
        let (next, rev) =
            tokio::join!(take(&mut *late, 1), commit(&*store, &lead, vec![], vec![put("z", "z")]));
        (next?, rev?)
    };
    demand!(next == changes(vec![put("z", "z")], rev), "a waiting watch gave {next:?}");
    drop((early, late));

    should("resign", store.resign(lead).await)?;
    let store = reopen(rig, store).await?;
    let mut old = should("watch", store.watch(b"", start).await)?;
    match take(&mut *old, 1).await?.pop() {
        Some(Change::Compacted(_)) => Ok(()),
        Some(first) if of(&first).0 == Rev(start.0 + 1) => Ok(()),
        other => Err(format!("after a restart a watch of the past began with {other:?}")),
    }
}

async fn watch_prefix(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    let start = commit(&*store, &lead, vec![], vec![put("p/0", "v")]).await?;
    let mut watch = should("watch", store.watch(b"p/", start).await)?;
    let writes = vec![put("p", "v"), put("p/a", "v"), put("p0", "v"), put("q/p/", "v")];
    let rev = commit(&*store, &lead, vec![], writes).await?;
    let last = commit(&*store, &lead, vec![], vec![put("p/b", "v")]).await?;
    let seen = take(&mut *watch, 2).await?;
    let expected = [changes(vec![put("p/a", "v")], rev), changes(vec![put("p/b", "v")], last)].concat();
    demand!(seen == expected, "a watch of `p/` gave {seen:?}");
    Ok(())
}

async fn get_latest(rig: &dyn Rig) -> Verdict {
    let store = fresh(rig).await?;
    let lead = lead(&*store, ANNA).await?;
    demand!(should("get", store.get(b"a").await)?.is_none(), "a fresh store has an entry");
    for n in 0..20 {
        let rev = commit(&*store, &lead, vec![], vec![put("a", &n.to_string())]).await?;
        let wanted = Entry { key: key("a"), value: key(&n.to_string()), rev };
        let seen = should("get", store.get(b"a").await)?;
        demand!(seen.as_ref() == Some(&wanted), "after writing {wanted:?} a read gave {seen:?}");
    }
    commit(&*store, &lead, vec![], vec![Write::Delete(key("a"))]).await?;
    let seen = should("get", store.get(b"a").await)?;
    demand!(seen.is_none(), "after the removal a read gave {seen:?}");
    Ok(())
}

// ---- helpers ----------------------------------------------------------------------------------------------------

async fn fresh(rig: &dyn Rig) -> Result<Arc<dyn StateStore>, String> {
    should("make a fresh store", rig.fresh().await)
}

async fn reopen(rig: &dyn Rig, old: Arc<dyn StateStore>) -> Result<Arc<dyn StateStore>, String> {
    should("open the store again", rig.reopen(old).await)
}

/// Takes the free lead. Asks more than once: that the first ask gets it is a clause of its own.
async fn lead(store: &dyn StateStore, me: Uuid) -> Result<Lead, String> {
    for _ in 0..3 {
        if let Some(lead) = should("lead", store.lead(me, TTL, Epoch(0)).await)? {
            return Ok(lead);
        }
    }
    Err("nobody has the lead, yet it is not given".into())
}

async fn commit(
    store: &dyn StateStore,
    lead: &Lead,
    checks: Vec<Check>,
    writes: Vec<Write>,
) -> Result<Rev, String> {
    should("commit", store.commit(lead, checks, writes).await)
}

/// All entries, by pages and in order, whatever order the store gives them in.
async fn all(store: &dyn StateStore, prefix: &str) -> Result<Vec<Entry>, String> {
    let (mut found, _) = should("scan", store.scan(prefix.as_bytes(), None, 1000).await)?;
    found.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(found)
}

/// The next `count` changes; fewer at the end of the watch.
async fn take(watch: &mut dyn Pull<Change>, count: usize) -> Result<Vec<Change>, String> {
    take_while(watch, |seen| seen.len() < count).await
}

/// The next changes, up to the first one of `rev` or later.
async fn take_until(watch: &mut dyn Pull<Change>, rev: Rev) -> Result<Vec<Change>, String> {
    take_while(watch, |seen| seen.last().is_none_or(|change| of(change).0 < rev)).await
}

async fn take_while(
    watch: &mut dyn Pull<Change>,
    more: impl Fn(&[Change]) -> bool,
) -> Result<Vec<Change>, String> {
    let mut seen = Vec::new();
    while more(&seen) {
        match tokio::time::timeout(PATIENCE, watch.next()).await {
            Ok(Some(change)) => seen.push(should("watch", change)?),
            Ok(None) => break,
            Err(_) => return Err(format!("the watch says nothing after {seen:?}")),
        }
    }
    Ok(seen)
}

fn changes(writes: Vec<Write>, rev: Rev) -> Vec<Change> {
    let change = |write| match write {
        Write::Put(key, value) => Change::Put(Entry { key, value, rev }),
        Write::Delete(key) => Change::Deleted { key, rev },
    };
    writes.into_iter().map(change).collect()
}

fn of(change: &Change) -> (Rev, Bytes) {
    match change {
        Change::Put(entry) => (entry.rev, entry.key.clone()),
        Change::Deleted { key, rev } => (*rev, key.clone()),
        Change::Compacted(rev) => (*rev, Bytes::new()),
    }
}

fn keys(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| String::from_utf8_lossy(&entry.key).into_owned()).collect()
}

fn key(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn put(name: &str, value: &str) -> Write {
    Write::Put(key(name), key(value))
}

const ANNA: Uuid = Uuid::from_u128(0xa);
const BERT: Uuid = Uuid::from_u128(0xb);
const OTHER: Uuid = Uuid::from_u128(0xc);
/// Longer than any check, so that none depends on the time.
const TTL: Duration = Duration::from_secs(3600);
/// When a watch that owes a change is taken to have lost it.
const PATIENCE: Duration = Duration::from_secs(10);
