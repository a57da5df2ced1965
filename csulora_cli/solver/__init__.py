"""The mathematics of the closest safe update: pure functions, tensors in, tensors out.

Every variant is one problem, solved in closed form, module by module:

    X = argmin_X ‖X − Δ‖²_F + penalty(X)

| symbol | name             | shape            | meaning                                                            |
|--------|------------------|------------------|--------------------------------------------------------------------|
| A      | lora_a           | (r, in)          | the adapter's first factor                                         |
| B      | lora_b           | (out, r)         | the adapter's second factor                                        |
| s      | scale            | -                | alpha/r, or alpha/sqrt(r) with rsLoRA                              |
| Δ=s·BA | update           | (out, in)        | the trained update; never materialised                             |
| X      | repaired update  | (out, in)        | the closest safe update; never materialised                        |
| D      | displacement     | (out, in)        | host weight − unaligned weight                                     |
| U      | left_basis       | (out, k)         | leading left singular directions of D, orthonormal                 |
| V      | right_basis      | (in, k)          | leading right singular directions of D, orthonormal                |
| σ      | singular_values  | (k,)             | singular values of D                                               |
| H, G   | faded, benign    | (in, N)          | inputs where Δ is to fade, and where to stay; one column a token   |
| C      | moment           | (in, in)         | second moment of the inputs, scaled to trace `in`                  |
| M      | protected        | (in, in)         | I + βC_b: the metric of the prompts source                         |
| K      | contrasted       | (in, in)         | C_h M⁻¹ C_h: its penalty                                           |
| λ      | strength         | -                | how much the unsafe part costs; 0 leaves the adapter as it is      |
| β      | protect          | -                | how much a change of behaviour on benign inputs costs              |

`attenuate` holds the closed forms that change A alone (prompts, and weights keep-out), `split` the three-way split
(weights keep-in), `displacement` the singular directions of D, `lowrank` what is done to a product B·A without
forming it.
"""
