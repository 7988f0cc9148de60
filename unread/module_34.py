def function_34(x):
    return x + 34
def function_34(x):
    return x + 34
def function_34(x):
    return x + 34
def function_34(x):
    return x + 34
def function_34(x):
    return x + 34
