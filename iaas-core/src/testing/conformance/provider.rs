//! The contract of [`Provider`], for rigs of any trait.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use super::Check;
use super::Verdict;
use super::calls::fresh;
use super::calls::make;
use super::calls::ours;
use super::calls::reopen;
use super::demand;
use super::rig::ConvergeRig;
use super::rig::Rig;
use super::should;
use super::should_fail;
use crate::Epoch;
use crate::ErrorKind;
use crate::Rev;
use crate::spi::Kind;
use crate::spi::Provider;
use crate::spi::Reading;

/// The checks that every provider must pass.
pub fn checks<R: Rig + ?Sized>() -> Vec<Check<R>> {
    vec![
        Check { clause: "hello-reads", run: |rig| Box::pin(hello_reads(rig)) },
        Check { clause: "claim-raises", run: |rig| Box::pin(claim_raises(rig)) },
        Check { clause: "claim-drains", run: |rig| Box::pin(claim_drains(rig)) },
    ]
}

/// The check of a provider whose objects are metered.
pub fn usage_checks<K: Kind, R: ConvergeRig<K> + ?Sized>() -> Vec<Check<R>> {
    vec![Check { clause: "usage-cumulative", run: |rig| Box::pin(usage_cumulative::<K, R>(rig)) }]
}

async fn hello_reads<R: Rig + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    should("a change", rig.change(&provider, &ours(1)).await)?;
    let before = should("a look at the world", rig.fingerprint().await)?;
    let first = should("hello", provider.hello().await)?;
    let second = should("hello", provider.hello().await)?;
    let after = should("a look at the world", rig.fingerprint().await)?;
    demand!(before == after, "hello had an effect");
    demand!(first == second, "two hellos differ: {first:?} and {second:?}");
    let epoch = first.newest.map(|(_, epoch, _)| epoch);
    demand!(epoch == Some(Epoch(1)), "after a claim with epoch 1 hello says {epoch:?}");
    should("a change after hello, by the same leader", rig.change(&provider, &ours(1)).await)?;
    let third = should("hello", provider.hello().await)?;
    demand!(third.install == first.install, "the installation changed by itself");
    Ok(())
}

async fn claim_raises<R: Rig + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    should("a claim", provider.claim(&ours(7)).await)?;
    refused(rig, &provider, "after the claim").await?;
    let provider = reopen(rig, provider).await?;
    refused(rig, &provider, "after a restart").await?;
    should_fail("a claim by an older leader", ErrorKind::Fenced, provider.claim(&ours(3)).await)?;
    should("a change by the newest leader", rig.change(&provider, &ours(7)).await)
}

/// A change by an older leader fails and has no effect.
async fn refused<R: Rig + ?Sized>(rig: &R, provider: &R::Provider, when: &str) -> Verdict {
    let before = should("a look at the world", rig.fingerprint().await)?;
    let changed = rig.change(provider, &ours(6)).await;
    should_fail(&format!("a change by an older leader {when}"), ErrorKind::Fenced, changed)?;
    let after = should("a look at the world", rig.fingerprint().await)?;
    demand!(before == after, "a fenced call had an effect {when}");
    Ok(())
}

async fn claim_drains<R: Rig + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    rig.slow(SLOW);
    let verdict = drains(rig, &provider).await;
    rig.slow(Duration::ZERO);
    verdict
}

async fn drains<R: Rig + ?Sized>(rig: &R, provider: &R::Provider) -> Verdict {
    let older = ours(1);
    let mut change = Box::pin(rig.change(provider, &older));
    // The older call is on its way before the claim comes.
    let begun = std::future::poll_fn(|cx| std::task::Poll::Ready(change.as_mut().poll(cx).is_ready())).await;
    demand!(!begun || !rig.slow(SLOW), "a slowed change ended at once");
    let claim = async {
        let claimed = provider.claim(&ours(2)).await;
        (claimed, rig.fingerprint().await)
    };
    let ended = async {
        if begun {
            return Ok(());
        }
        change.await
    };
    let ((claimed, at_claim), changed) = tokio::join!(claim, ended);
    should("the claim", claimed)?;
    let at_claim = should("a look at the world", at_claim)?;
    if changed.is_ok() {
        let after = should("a look at the world", rig.fingerprint().await)?;
        demand!(at_claim == after, "an older call had its effect after the claim had returned");
    }
    Ok(())
}

async fn usage_cumulative<K: Kind, R: ConvergeRig<K> + ?Sized>(rig: &R) -> Verdict {
    let provider = fresh(rig).await?;
    make(rig, &provider, &ours(1), 1, Rev(1)).await?;
    let mut last = BTreeMap::new();
    let first = should("usage", provider.usage(&ours(1), None, 100).await)?;
    demand!(!first.is_empty(), "nothing is metered");
    grew(&mut last, first)?;
    tokio::time::sleep(Duration::from_millis(2)).await;
    grew(&mut last, should("usage", provider.usage(&ours(1), None, 100).await)?)?;
    let provider = reopen(rig, provider).await?;
    grew(&mut last, should("usage after a restart", provider.usage(&ours(1), None, 100).await)?)
}

/// Compares readings with the last ones of the same lives.
fn grew(last: &mut BTreeMap<(String, u64, u64), Reading>, readings: Vec<Reading>) -> Verdict {
    for reading in readings {
        let key = (reading.of.to_string(), reading.term.0, reading.life);
        if let Some(old) = last.get(&key) {
            demand!(reading.seq > old.seq, "seq went from {} to {}", old.seq, reading.seq);
            for (meter, was) in &old.totals {
                let now = reading.totals.get(meter).copied().unwrap_or(0);
                demand!(now >= *was, "the total of {meter} shrank from {was} to {now}");
            }
        }
        last.insert(key, reading);
    }
    Ok(())
}

/// How long a slowed call takes.
const SLOW: Duration = Duration::from_millis(60);
