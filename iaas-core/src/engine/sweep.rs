//! The sweep: what lies on a site under our tag and in no record. It is a defect counter first, a cleaner second.
//!
//! An orphan must be older than the newest claim, and seen in two sweeps. What holds data is never removed: it is
//! reported for the operator. A sweep that wants more than a few objects stops and says so.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::codec;
use super::commit::Committer;
use super::commit::SELF;
use super::draft::Draft;
use super::queue::Next;
use super::reconcile::Work;
use super::sites::artifact_id;
use super::state::State;
use super::tokens;
use crate::Digest;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::model::*;
use crate::spi::Converge;
use crate::spi::Kind;
use crate::spi::artifact::Artifacts;

/// Looks for orphans.
#[derive(Debug, Default)]
pub struct Sweeper {
    suspects: Mutex<BTreeMap<String, BTreeSet<ObjectRef>>>,
    quarantine: Mutex<BTreeSet<ObjectRef>>,
    removed: AtomicU64,
    /// When tokens were looked through, on the monotonic clock.
    tokens: Mutex<Option<Duration>>,
}

impl Sweeper {
    /// How many orphans were removed so far: each is a defect of ours.
    pub fn removed(&self) -> u64 {
        self.removed.load(Ordering::Relaxed)
    }

    /// Orphans that hold data: for the operator to adopt or to delete.
    pub fn quarantine(&self) -> BTreeSet<ObjectRef> {
        self.quarantine.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One sweep over all sites.
    ///
    /// # Errors
    /// Those of the providers.
    pub async fn look(&self, work: &Work) -> Result<Next> {
        let mut first = Ok(());
        let mut note = |done: Result<()>| {
            // A site that does not answer holds up no other one.
            if let Err(error) = done {
                tracing::warn!(%error, "a part of the sweep failed");
                first = std::mem::replace(&mut first, Ok(())).and(Err(error));
            }
        };
        for (id, host) in &work.sites.hosts {
            let site = |kind: &str| format!("{id}/{kind}");
            note(
                self.sweep(work, &site("vm"), &*host.hypervisor, |s, id| {
                    s.instances.contains_key(&id.cast())
                })
                .await,
            );
            note(
                self.sweep(work, &site("plug"), &*host.plugs, |s, id| s.attachments.contains_key(&id.cast()))
                    .await,
            );
            for (pool, access) in &host.access {
                let site = site(&format!("access/{pool}"));
                note(
                    self.sweep(work, &site, &**access, |s, id| s.attachments.contains_key(&id.cast())).await,
                );
            }
        }
        for (id, pool) in &work.sites.pools {
            note(
                self.sweep(work, &format!("{id}"), &**pool, |s, id| s.volumes.contains_key(&id.cast())).await,
            );
        }
        note(forget_operations(&work.committer).await);
        note(forget_ownerless(&work.committer).await);
        note(self.forget_tokens(&work.committer).await);
        let named: BTreeSet<Digest> = work.committer.read(|s| named(s).collect());
        // Blobs know no epoch: whoever does not lead any more must not judge by old records.
        note(match work.committer.store().renew(work.committer.lead()).await {
            Ok(()) => work.blobs.retain(&named, UNNAMED).await,
            Err(error) => Err(error),
        });
        first.map(|()| Next::Check(EVERY))
    }

    /// Forgets the answers of tokens that were given long ago; now and then, because it reads all of them.
    async fn forget_tokens(&self, committer: &Arc<Committer>) -> Result<()> {
        let (now, at) = (committer.clock().now(), committer.clock().monotonic());
        let last = *self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| at.saturating_sub(last) < TOKENS_EVERY) {
            return Ok(());
        }
        let mut after: Option<bytes::Bytes> = None;
        loop {
            let (page, _) = committer.store().scan(codec::TOKENS.as_bytes(), after.as_deref(), PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.key.clone());
            let old: Vec<bytes::Bytes> = page
                .iter()
                .filter(|entry| tokens::age(&entry.value, now).is_some_and(|age| age > KEEP_TOKENS))
                .map(|entry| entry.key.clone())
                .collect();
            if !old.is_empty() {
                let forget = |draft: &mut Draft<'_>| {
                    old.iter().for_each(|key| draft.delete_raw(key.clone()));
                    Ok(())
                };
                committer.commit(SELF, forget).await?;
            }
        }
        *self.tokens.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
        Ok(())
    }

    async fn sweep<K: Kind, P: Converge<K> + ?Sized>(
        &self,
        work: &Work,
        site: &str,
        provider: &P,
        known: impl Fn(&State, Id<K>) -> bool,
    ) -> Result<()> {
        // The inventory is read before the state: what is committed meanwhile is known by then.
        let newest = work.committer.read(|s| s.rev);
        let mut orphans: Vec<(Id<K>, Rev)> = Vec::new();
        let mut after = None;
        loop {
            let page = provider.inventory(&work.caller.own(), after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            let orphan = |f: &&crate::spi::Found<K>| {
                f.tag.incarnation == work.caller.incarnation && f.tag.rev <= newest
            };
            let stray = page.iter().filter(orphan).filter(|f| !work.committer.read(|s| known(s, f.id)));
            orphans.extend(stray.map(|f| (f.id, f.tag.rev)));
        }
        let now: BTreeSet<ObjectRef> = orphans.iter().map(|(id, _)| id.object()).collect();
        let before =
            self.suspects.lock().unwrap_or_else(PoisonError::into_inner).insert(site.to_owned(), now);
        let twice = |id: Id<K>| before.as_ref().is_some_and(|b| b.contains(&id.object()));
        orphans.retain(|(id, _)| twice(*id));
        if orphans.len() > MOST {
            tracing::error!(site, orphans = orphans.len(), "too many orphans: nothing is removed");
            return Ok(());
        }
        for (id, rev) in orphans {
            if K::HOLDS_DATA {
                self.quarantine.lock().unwrap_or_else(PoisonError::into_inner).insert(id.object());
                continue;
            }
            tracing::error!(site, object = %id.object(), "an orphan is removed");
            provider.remove(&work.caller.own(), id, rev).await?;
            self.removed.fetch_add(1, Ordering::Relaxed);
            let note =
                |draft: &mut Draft<'_>| draft.audit("orphan.remove", &id.object(), site.to_owned().into());
            work.committer.commit(SELF, note).await?;
        }
        Ok(())
    }
}

/// Removes kernels and initrds that no image names any more from the hosts: what is brought on demand goes so too.
///
/// # Errors
/// Those of the providers.
pub async fn evict_artifacts(work: &Work) -> Result<Next> {
    let mut first = Ok(());
    for host in work.sites.hosts.values() {
        // A host that does not answer holds up no other one.
        if let Err(error) = evict_from(work, &*host.artifacts).await {
            first = first.and(Err(error));
        }
    }
    first.map(|()| Next::Rest)
}

async fn evict_from(work: &Work, artifacts: &dyn Artifacts) -> Result<()> {
    let mut after = None;
    loop {
        let page = artifacts.inventory(&work.caller.own(), after, PAGE).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after = Some(last.id);
        let wanted = work.committer.read(wanted);
        let ours = page.iter().filter(|f| f.tag.incarnation == work.caller.incarnation);
        for found in ours.filter(|f| !wanted.contains(&f.id)) {
            artifacts.remove(&work.caller.own(), found.id, found.tag.rev).await?;
        }
    }
}

/// The artifacts that images name.
fn wanted(state: &State) -> BTreeSet<Id<crate::spi::artifact::Artifact>> {
    named(state).map(artifact_id).collect()
}

fn named(state: &State) -> impl Iterator<Item = Digest> {
    state.images.values().flat_map(|image| {
        let ImageSpec::Kernel { kernel, initrd, .. } = &image.spec;
        std::iter::once(*kernel).chain(*initrd)
    })
}

/// Forgets what only describes owners that are gone: the commit that deletes an owner takes no more than it can hold.
async fn forget_ownerless(committer: &Arc<Committer>) -> Result<()> {
    loop {
        let left = |s: &State| {
            let gone = |owner: Owner| match owner {
                Owner::Cloud => false,
                Owner::Organization(id) => !s.organizations.contains_key(&id),
                Owner::Project(id) => !s.projects.contains_key(&id),
            };
            let quotas: Vec<_> =
                s.quotas.values().filter(|r| gone(r.meta.owner)).map(|r| r.meta.id).take(100).collect();
            let bindings: Vec<_> =
                s.bindings.values().filter(|r| gone(r.meta.owner)).map(|r| r.meta.id).take(100).collect();
            let ended: Vec<_> = s
                .operations
                .values()
                .filter(|r| gone(r.meta.owner) && r.status.state != OperationState::Open)
                .map(|r| r.meta.id)
                .take(100)
                .collect();
            (quotas, bindings, ended)
        };
        let (quotas, bindings, ended) = committer.read(left);
        if quotas.is_empty() && bindings.is_empty() && ended.is_empty() {
            return Ok(());
        }
        let forget = |draft: &mut Draft<'_>| {
            quotas.iter().for_each(|id| draft.delete(*id));
            bindings.iter().for_each(|id| draft.delete(*id));
            ended.iter().for_each(|id| draft.delete(*id));
            Ok(())
        };
        committer.commit(SELF, forget).await?;
    }
}

/// Forgets operations that ended long ago.
async fn forget_operations(committer: &Arc<Committer>) -> Result<()> {
    let now = committer.clock().now();
    let old = |o: &&std::sync::Arc<Record<Operation>>| {
        let aged = o.status.ended.is_some_and(|ended| {
            Duration::try_from(ended.duration_until(now)).is_ok_and(|age| age > KEEP_OPERATIONS)
        });
        aged && o.status.state != OperationState::Open
    };
    loop {
        let batch: Vec<_> =
            committer.read(|s| s.operations.values().filter(old).map(|o| o.meta.id).take(100).collect());
        if batch.is_empty() {
            return Ok(());
        }
        let forget = |draft: &mut Draft<'_>| {
            batch.iter().for_each(|id| draft.delete(*id));
            Ok(())
        };
        committer.commit(SELF, forget).await?;
    }
}

/// How often a site is swept.
const EVERY: Duration = Duration::from_secs(60);
/// How long a blob that no image names is kept: an import puts it before its image names it.
const UNNAMED: Duration = Duration::from_secs(3600);
/// Ended operations are kept this long.
const KEEP_OPERATIONS: Duration = Duration::from_secs(24 * 3600);
/// How long the answer to a token is kept at least.
const KEEP_TOKENS: Duration = Duration::from_secs(24 * 3600);
/// How often old answers are looked for.
const TOKENS_EVERY: Duration = Duration::from_secs(3600);
/// Objects per page of an inventory.
const PAGE: usize = 256;
/// The most orphans that a sweep removes by itself.
const MOST: usize = 8;
