//! The contract of [`Converge`], written once for all kinds.

use std::future::Future;
use std::task::Poll;

use tokio::task::JoinSet;

use super::Check;
use super::Verdict;
use super::calls::absent;
use super::calls::count;
use super::calls::fresh;
use super::calls::gone;
use super::calls::id;
use super::calls::make;
use super::calls::ours;
use super::calls::put;
use super::calls::reopen;
use super::calls::theirs;
use super::calls::until;
use super::demand;
use super::provider;
use super::rig::ConvergeRig;
use super::should;
use super::should_fail;
use crate::ErrorKind;
use crate::Id;
use crate::Outcome;
use crate::Rev;
use crate::spi::Converge;
use crate::spi::Kind;
use crate::spi::Phase;
use crate::spi::Provider;
use crate::testing::fake::Fault;

/// The checks of [`Provider`] and of `Converge<K>`.
pub fn checks<K: Kind, R: ConvergeRig<K> + ?Sized>() -> Vec<Check<R>> {
    let mut all = provider::checks();
    all.extend([
        Check { clause: "ensure-idempotent", run: |rig| Box::pin(ensure_idempotent::<K, R>(rig)) as _ },
        Check { clause: "ensure-older-conflicts", run: |rig| Box::pin(ensure_older_conflicts::<K, R>(rig)) },
        Check { clause: "ensure-after-crash", run: |rig| Box::pin(ensure_after_crash::<K, R>(rig)) },
        Check { clause: "remove-absent-ok", run: |rig| Box::pin(remove_absent_ok::<K, R>(rig)) },
        Check { clause: "remove-newer-refused", run: |rig| Box::pin(remove_newer_refused::<K, R>(rig)) },
        Check { clause: "remove-complete", run: |rig| Box::pin(remove_complete::<K, R>(rig)) },
        Check {
            clause: "observe-survives-reopen",
            run: |rig| Box::pin(observe_survives_reopen::<K, R>(rig)),
        },
        Check { clause: "inventory-complete", run: |rig| Box::pin(inventory_complete::<K, R>(rig)) },
        Check { clause: "inventory-ours-only", run: |rig| Box::pin(inventory_ours_only::<K, R>(rig)) },
        Check { clause: "fenced-no-effect", run: |rig| Box::pin(fenced_no_effect::<K, R>(rig)) },
        Check { clause: "concurrent-ensure-one", run: |rig| Box::pin(concurrent_ensure_one::<K, R>(rig)) },
        Check { clause: "outcome-honest", run: |rig| Box::pin(outcome_honest::<K, R>(rig)) },
        Check { clause: "bad-spec-invalid", run: |rig| Box::pin(bad_spec_invalid::<K, R>(rig)) },
    ]);
    all
}

async fn ensure_idempotent<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    let (id, spec) = (id::<K>(), rig.spec(1));
    let first = put(rig, &*provider, &ours(1), id, Rev(3), &spec).await?;
    let second = put(rig, &*provider, &ours(1), id, Rev(3), &spec).await?;
    demand!(
        first.applied == Rev(3) && second.applied == Rev(3),
        "ensured at revision 3, then again: {} and {}",
        first.applied,
        second.applied
    );
    let many = count(rig, &*provider).await?;
    demand!(many == 1, "ensure twice made {many} objects");
    Ok(())
}

async fn ensure_older_conflicts<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    let (id, spec) = (id::<K>(), rig.spec(1));
    put(rig, &*provider, &ours(1), id, Rev(5), &spec).await?;
    let older = provider.ensure(&ours(1), id, Rev(4), &spec).await;
    should_fail("ensure with an older revision", ErrorKind::Conflict, older)?;
    let seen = until(rig, &*provider, &ours(1), id, "stay", |_| true).await?;
    demand!(seen.applied == Rev(5), "an older ensure moved the revision to {}", seen.applied);
    Ok(())
}

async fn ensure_after_crash<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    for fault in [Fault::NotLanded, Fault::ReplyLost, Fault::Half] {
        broken_ensure::<K, R>(rig, fault, false).await?;
        broken_ensure::<K, R>(rig, fault, true).await?;
        broken_remove::<K, R>(rig, fault).await?;
    }
    for polls in 1..4 {
        dropped_ensure::<K, R>(rig, polls).await?;
    }
    Ok(())
}

/// An ensure goes wrong; after a restart the thing is finished, or removed, and nothing else is there.
async fn broken_ensure<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R, fault: Fault, remove: bool) -> Verdict {
    let provider = fresh(rig).await?;
    if !rig.break_next(fault) {
        return Ok(());
    }
    let (id, spec) = (id::<K>(), rig.spec(1));
    let ended = provider.ensure(&ours(1), id, Rev(1), &spec).await;
    demand!(ended.is_err(), "{fault:?} was not noticed by the caller: {ended:?}");
    let provider = reopen_claimed::<K, R>(rig, provider).await?;
    if remove {
        should("remove after an error", provider.remove(&ours(1), id, Rev(1)).await)?;
        return gone(rig, &*provider, &ours(1), id).await.map_err(|e| format!("{fault:?}: {e}"));
    }
    put(rig, &*provider, &ours(1), id, Rev(1), &spec).await?;
    let many = count::<K, R>(rig, &*provider).await?;
    demand!(many == 1, "{fault:?}, then ensure again, made {many} objects");
    Ok(())
}

async fn broken_remove<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R, fault: Fault) -> Verdict {
    let provider = fresh(rig).await?;
    let id = make::<K, R>(rig, &*provider, &ours(1), 1, Rev(1)).await?;
    if !rig.break_next(fault) {
        return Ok(());
    }
    let ended = provider.remove(&ours(1), id, Rev(1)).await;
    demand!(ended.is_err(), "{fault:?} was not noticed by the caller of remove");
    let provider = reopen_claimed::<K, R>(rig, provider).await?;
    should("remove after an error", provider.remove(&ours(1), id, Rev(1)).await)?;
    gone(rig, &*provider, &ours(1), id).await.map_err(|e| format!("remove, {fault:?}: {e}"))
}

/// The caller of an ensure goes away in its midst; after a restart it is removed.
async fn dropped_ensure<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R, polls: u32) -> Verdict {
    let provider = fresh(rig).await?;
    let (id, spec, cx) = (id::<K>(), rig.spec(1), ours(1));
    let mut call = Box::pin(provider.ensure(&cx, id, Rev(1), &spec));
    for _ in 0..polls {
        let ended = std::future::poll_fn(|task| Poll::Ready(call.as_mut().poll(task).is_ready())).await;
        if ended {
            break;
        }
        tokio::task::yield_now().await;
    }
    drop(call);
    let provider = reopen_claimed::<K, R>(rig, provider).await?;
    should("remove after a dropped ensure", provider.remove(&ours(1), id, Rev(1)).await)?;
    gone(rig, &*provider, &ours(1), id).await
}

async fn reopen_claimed<K: Kind, R: ConvergeRig<K> + ?Sized>(
    rig: &R,
    old: std::sync::Arc<R::Provider>,
) -> Result<std::sync::Arc<R::Provider>, String> {
    let provider = reopen(rig, old).await?;
    should("a claim after a restart", provider.claim(&ours(1)).await)?;
    Ok(provider)
}

async fn remove_absent_ok<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    let id = id::<K>();
    should("remove of an id that never was", provider.remove(&ours(1), id, Rev(1)).await)?;
    absent(rig, &*provider, &ours(1), id).await
}

async fn remove_newer_refused<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    let id = make::<K, R>(rig, &*provider, &ours(1), 1, Rev(5)).await?;
    let older = provider.remove(&ours(1), id, Rev(4)).await;
    should_fail("remove of something newer", ErrorKind::Conflict, older)?;
    // Its leader has a newer epoch, so that the tag refuses it and not the fence.
    let mut other = ours(2);
    other.call.incarnation = uuid::Uuid::from_u128(0xdead);
    let foreign = provider.remove(&other, id, Rev(9)).await;
    should_fail("remove by another incarnation", ErrorKind::Conflict, foreign)?;
    until(rig, &*provider, &ours(1), id, "stay", |seen| seen.phase == Phase::Settled).await?;
    Ok(())
}

async fn remove_complete<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    let id = make::<K, R>(rig, &*provider, &ours(1), 1, Rev(1)).await?;
    let other = make::<K, R>(rig, &*provider, &ours(1), 2, Rev(2)).await?;
    should("remove", provider.remove(&ours(1), id, Rev(1)).await)?;
    gone(rig, &*provider, &ours(1), id).await?;
    until(rig, &*provider, &ours(1), other, "stay", |seen| seen.phase == Phase::Settled).await?;
    Ok(())
}

async fn observe_survives_reopen<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    let id = make::<K, R>(rig, &*provider, &ours(1), 1, Rev(3)).await?;
    let provider = reopen(rig, provider).await?;
    let seen = until(rig, &*provider, &ours(1), id, "settle", |seen| seen.phase == Phase::Settled).await?;
    demand!(seen.applied == Rev(3), "after a restart the revision is {} instead of 3", seen.applied);
    Ok(())
}

async fn inventory_complete<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    let mut made = Vec::new();
    for number in 1..=5 {
        made.push(make::<K, R>(rig, &*provider, &ours(1), number, Rev(number.into())).await?);
    }
    let mut listed: Vec<Id<K>> = Vec::new();
    loop {
        let page = should("inventory", provider.inventory(&ours(1), listed.last().copied(), 2).await)?;
        demand!(page.len() <= 2, "a page of at most 2 has {}", page.len());
        if page.is_empty() {
            break;
        }
        for found in page {
            demand!(found.tag.cloud == ours(1).call.cloud, "an object has the tag {:?}", found.tag);
            listed.push(found.id);
        }
        demand!(listed.len() <= 10, "inventory does not end: {listed:?}");
    }
    demand!(listed == made, "made {made:?}, listed {listed:?}");
    Ok(())
}

async fn inventory_ours_only<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    let our = make::<K, R>(rig, &*provider, &ours(1), 1, Rev(1)).await?;
    let their = make::<K, R>(rig, &*provider, &theirs(1), 2, Rev(1)).await?;
    should("planting an untagged thing", rig.plant(id::<K>()).await)?;
    for (cx, own) in [(ours(1), our), (theirs(1), their)] {
        let listed: Vec<Id<K>> = should("inventory", provider.inventory(&cx, None, 100).await)?
            .into_iter()
            .map(|f| f.id)
            .collect();
        demand!(listed == [own], "a cloud owns {own:?} and is shown {listed:?}");
    }
    Ok(())
}

async fn fenced_no_effect<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    let old = make::<K, R>(rig, &*provider, &ours(1), 1, Rev(1)).await?;
    should("a claim", provider.claim(&ours(5)).await)?;
    let (new, spec) = (id::<K>(), rig.spec(2));
    should_fail("a fenced ensure", ErrorKind::Fenced, provider.ensure(&ours(4), new, Rev(2), &spec).await)?;
    absent(rig, &*provider, &ours(5), new).await.map_err(|e| format!("after a fenced ensure {e}"))?;
    should_fail("a fenced remove", ErrorKind::Fenced, provider.remove(&ours(4), old, Rev(9)).await)?;
    // Reads neither check the epoch nor raise it.
    until(rig, &*provider, &ours(1), old, "stay", |seen| seen.phase == Phase::Settled).await?;
    should("observe by a later leader", provider.observe(&ours(9), old).await)?;
    should("inventory by a later leader", provider.inventory(&ours(9), None, 10).await)?;
    put(rig, &*provider, &ours(5), new, Rev(2), &spec).await?;
    Ok(())
}

async fn concurrent_ensure_one<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    let (id, spec) = (id::<K>(), rig.spec(1));
    let mut racing = JoinSet::new();
    for _ in 0..8 {
        let (provider, spec) = (provider.clone(), spec.clone());
        racing.spawn(async move { provider.ensure(&ours(1), id, Rev(1), &spec).await.map(|_| ()) });
    }
    let ends = racing.join_all().await;
    demand!(ends.iter().any(Result::is_ok), "of eight ensures at once none succeeded: {:?}", ends.first());
    put(rig, &*provider, &ours(1), id, Rev(1), &spec).await?;
    let many = count::<K, R>(rig, &*provider).await?;
    demand!(many == 1, "eight ensures at once made {many} objects");
    Ok(())
}

async fn outcome_honest<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    for fault in [Fault::Refused, Fault::NotLanded, Fault::ReplyLost, Fault::Half] {
        let provider = fresh(rig).await?;
        if !rig.break_next(fault) {
            continue;
        }
        let (id, spec) = (id::<K>(), rig.spec(1));
        let Err(error) = provider.ensure(&ours(1), id, Rev(1), &spec).await else {
            return Err(format!("{fault:?} was not noticed by the caller"));
        };
        if error.outcome() == Outcome::NotDone {
            absent(rig, &*provider, &ours(1), id).await.map_err(|e| format!("it said NotDone, but {e}"))?;
        }
    }
    let provider = fresh(rig).await?;
    let id = make::<K, R>(rig, &*provider, &ours(1), 1, Rev(5)).await?;
    let Err(error) = provider.ensure(&ours(1), id, Rev(4), &rig.spec(1)).await else { return Ok(()) };
    demand!(error.outcome() == Outcome::NotDone, "a refused revision is {:?}", error.outcome());
    Ok(())
}

async fn bad_spec_invalid<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    for spec in rig.bad() {
        let provider = fresh(rig).await?;
        let id = id::<K>();
        let ended = provider.ensure(&ours(1), id, Rev(1), &spec).await;
        should_fail(&format!("ensure of {spec:?}"), ErrorKind::Invalid, ended)?;
        absent(rig, &*provider, &ours(1), id).await?;
    }
    Ok(())
}
